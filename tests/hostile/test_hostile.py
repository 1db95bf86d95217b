"""Steps made to harm whoever reads them, every digest valid: refused with a typed error, soon, in little memory.

All of them are read by one process of its own (`victim`), whose memory is limited.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import victim
from forge import Forge, seal_header_bytes, with_crc
from numcodecs import blosc, zstd

CORRUPT, UNSUPPORTED = "corrupt_checkpoint", "unsupported_state"
ENDS = {"ok", "damaged", CORRUPT, UNSUPPORTED, "unsupported_format", "state_mismatch", "nothing_committed"}

pytestmark = pytest.mark.timeout(300)

Tamper = Callable[[Forge], object]
CASES: dict[str, tuple[Tamper, str]] = {}


def hostile(tamper: Tamper) -> Tamper:
    """A case that ends in `CorruptCheckpointError`; *tamper* returns False when it sealed the step itself."""
    CASES[tamper.__name__] = (tamper, CORRUPT)
    return tamper


def ending_in(code: str) -> Callable[[Tamper], Tamper]:
    def add(tamper: Tamper) -> Tamper:
        CASES[tamper.__name__] = (tamper, code)
        return tamper

    return add


def each(**values: Any) -> Callable[[Callable[[Forge, Any], object]], None]:
    """One hostile case per value."""

    def add(tamper: Callable[[Forge, Any], object]) -> None:
        for name, value in values.items():
            CASES[f"{tamper.__name__}[{name}]"] = (lambda forge, value=value: tamper(forge, value), CORRUPT)

    return add


# -- the state tree --------------------------------------------------------------------------------


@each(
    parent="../../secret",
    inner="state/../../secret",
    absolute="/etc/passwd",
    empty="",
    backslash="..\\secret",
    nul="state/\0",
    dot="state/./big",
    double="state//big",
    encoded="state/%2e%2e/\u2025",
    number=5,
    long="state/" + "a/" * 3000,
    index="index/rank-00000",
    step="zarr.json",
)
def key(forge: Forge, value: Any) -> None:
    forge.header["tree"]["big"]["key"] = value


@each(
    outside={"shape": [1500, 1000], "stride": [1000, 1], "offset": 1},
    far={"shape": [1500, 1000], "stride": [2**40, 1], "offset": 0},
    huge_offset={"shape": [1, 1], "stride": [1, 1], "offset": 2**61},
    negative_stride={"shape": [1500, 1000], "stride": [-1000, 1], "offset": 1_499_000},
    negative_offset={"shape": [1500, 1000], "stride": [1000, 1], "offset": -1},
    overflow={"shape": [2**40, 2**40], "stride": [0, 0], "offset": 0},
    empty_but_far={"shape": [0, 1000], "stride": [1, 1], "offset": 2**61},
    other_shape={"shape": [2, 2], "stride": [1, 1], "offset": 0},
    no_list={"shape": "ab", "stride": "ab", "offset": None},
)
def view(forge: Forge, value: Any) -> None:
    node = forge.header["tree"]["corner"]
    node["view"] = value
    if value["offset"] is not None and value["shape"] != [2, 2]:
        node["shape"] = value["shape"]


def nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    node: Any = 1
    for _ in range(levels):
        node = wrap(node)
    return node


@each(
    lists=nested(450, lambda node: [node]),
    tuples=nested(200, lambda node: {"$": "tuple", "items": [node]}),
    custom=nested(140, lambda node: {"$": "custom", "type": "builtins:set", "value": [node]}),
    optimizers=nested(
        140,
        lambda node: {
            "$": "optimizer",
            "parameters": [],
            "modules": [],
            "group_sizes": [],
            "param_groups": [],
            "slots": {},
            "extra_state": {},
            "extra": {"x": node},
        },
    ),
    keys=nested(80, lambda node: {"$": "dict", "items": [[{"$": "tuple", "items": [node]}, 1]]}),
    unhashable={"$": "dict", "items": [[[1], 1]]},
    no_items={"$": "tuple"},
    items_no_list={"$": "odict", "items": 5},
    tag_unknown={"$": "pickle", "value": "gASVAAAA"},
    tag_no_text={"$": ["tuple"], "items": []},
    base64={"$": "bytes", "value": "!!!!"},
    bits={"$": "float", "bits": "7ff"},
    complex={"$": "complex", "real": [], "imag": 0.0},
    surrogates={"$": "str", "value": "/////w=="},
    date={"$": "datetime", "value": "yesterday", "fold": 0},
    fold={"$": "datetime", "value": "2026-01-01T00:00:00", "fold": 2**70},
    device={"$": "torch.device", "name": "cuda:99999999999999999999"},
    size={"$": "torch.Size", "items": [2**63]},
    dtype={"$": "torch.dtype", "name": "Tensor"},
    scalar={"$": "npscalar", "dtype": "float32", "data": "AAAA"},
    scalar_object={"$": "npscalar", "dtype": "object", "data": "AAAAAAAAAAA="},
    deque={"$": "custom", "type": "collections:deque", "value": 7},
    defaultdict={"$": "custom", "type": "collections:defaultdict", "value": {"factory": "eval", "items": {}}},
    set_of_lists={"$": "custom", "type": "builtins:set", "value": [[1]]},
)
def value(forge: Forge, node: Any) -> None:
    forge.header["tree"]["plain"]["list"] = node


@each(
    text="big",
    list=[1],
    none=None,
    tensor={"$": "tensor", "key": "state/big", "dtype": "float32", "shape": [1500, 1000]},
)
def tree(forge: Forge, node: Any) -> None:
    forge.header["tree"] = node


@each(
    shape={"shape": [1500, 999]},
    dimensions={"shape": [1] * 5000},
    dtype={"dtype": "int32"},
    no_dtype={"dtype": "Module"},
    wide={"dtype": "complex128"},
    device={"device": {"a": 1}},
    shape_text={"shape": "1500"},
    shape_float={"shape": [1500.0, 1000]},
    shape_huge={"shape": [10**18]},
    dtype_list={"dtype": ["float32"]},
)
def tensor(forge: Forge, changes: dict[str, Any]) -> None:
    forge.header["tree"]["big"] |= changes


@each(
    values={"values": {"$": "tensor", "key": "state/big", "dtype": "float32", "shape": [1500, 1000]}},
    scales={"scales": {"$": "tensor", "key": "state/plain/small", "dtype": "float32", "shape": []}},
    axis={"axis": 7},
    other_axis={"axis": 1},
    negative_axis={"axis": -1},
    dtype={"dtype": "quint8"},
    no_qdtype={"dtype": "float32"},
)
def quantized(forge: Forge, changes: dict[str, Any]) -> None:
    forge.header["tree"]["quantized"] |= changes


@each(
    sizes={"group_sizes": [2, 2]},
    module={"modules": []},
    labels={"parameters": [["weight", [30, 40], 0], ["weight", [30], 0]]},
    label_list={"parameters": [[["weight"], [30, 40], 0], ["bias", [30], 0]]},
    shape_text={"parameters": [["weight", "ab", 0], ["bias", [30], 0]]},
    groups={"param_groups": [1]},
    groups_tuple={"param_groups": {"$": "tuple", "items": [[1, 2]]}},
    slots={"slots": [1]},
    slot_of_nobody={"slots": {"step": {"nobody": 1}}},
    extra={"extra": 5},
    extra_state={"extra_state": [1]},
)
def optimizer(forge: Forge, changes: dict[str, Any]) -> None:
    forge.header["tree"]["optimizer"] |= changes


@ending_in(UNSUPPORTED)
def enum_of_a_module_that_is_not_imported(forge: Forge) -> None:
    forge.header["tree"]["plain"]["list"] = {"$": "enum", "type": "antigravity:Comic", "name": "X"}


@ending_in(UNSUPPORTED)
def enum_through_a_module_that_imports_lazily(forge: Forge) -> None:
    forge.header["tree"]["plain"]["list"] = {"$": "enum", "type": "asyncckpt:open_zarr", "name": "X"}


@ending_in(UNSUPPORTED)
def enum_that_is_no_enum(forge: Forge) -> None:
    forge.header["tree"]["plain"]["list"] = {"$": "enum", "type": "os:environ", "name": "HOME"}


@ending_in(UNSUPPORTED)
def type_that_is_not_registered(forge: Forge) -> None:
    forge.header["tree"]["plain"]["list"] = {"$": "custom", "type": "os:system", "value": "touch /tmp/hacked"}


# -- the header ------------------------------------------------------------------------------------


@each(
    bytes_negative={"raw_bytes": -1},
    raw_small={"raw_bytes": 1000},
    count_huge={"stored_bytes": 10**40},
    step={"step": 6},
    step_text={"step": "5"},
    created={"created": "now"},
    created_without_zone={"created": "2026-01-01T00:00:00"},
    created_before_time={"created": "0001-01-01T00:00:00+23:59"},
    metrics={"metrics": [1]},
    metric={"metrics": {"loss": "low"}},
    metric_huge={"metrics": {"loss": {"$": "int", "value": "0x1" + "0" * 400}}},
    ranks={"world_size": 2},
    no_index={"indexes": []},
    inline={"inline": {"../x": {"dtype": "int8", "shape": [1], "data": "AA=="}}},
    unknown={"extra": 1},
    tags={"tags": "good"},
    versions={"versions": {"torch": 2}},
    metadata={"metadata": {"$": "tensor", "key": "state/big", "dtype": "int8", "shape": []}},
)
def header(forge: Forge, changes: dict[str, Any]) -> None:
    forge.header |= changes


@each(
    data={"data": "!!"},
    short={"data": "AADA"},
    dtype={"dtype": "object"},
    shape={"shape": [2]},
    negative={"shape": [-1, -1]},
    huge={"shape": [2**62, 2**62, 0], "data": ""},
    dimensions={"shape": [1] * 3000},
)
def inline(forge: Forge, changes: dict[str, Any]) -> None:
    forge.header["inline"]["state/plain/small"] |= changes


def rewrite_header(forge: Forge, old: bytes, new: bytes) -> bool:
    data = forge.read("zarr.json")
    assert old in data
    (forge.directory / "zarr.json").write_bytes(seal_header_bytes(data.replace(old, new, 1)))
    return False


@hostile
def header_with_a_member_twice(forge: Forge) -> bool:
    return rewrite_header(forge, b'"kind":"regular"', b'"kind":"regular","kind":"emergency"')


@hostile
def tree_with_a_member_twice(forge: Forge) -> bool:
    return rewrite_header(forge, b'"tree":{', b'"tree":{"array":1,')


@hostile
def header_nested_beyond_the_parser(forge: Forge) -> bool:
    return rewrite_header(forge, b'"metadata":{}', b'"metadata":' + b"[" * 100_000 + b"]" * 100_000)


@hostile
def header_with_a_number_beyond_the_parser(forge: Forge) -> bool:
    return rewrite_header(forge, b'"metadata":{}', b'"metadata":{"n":' + b"9" * 100_000 + b"}")


@hostile
def header_with_an_infinite_number(forge: Forge) -> bool:
    return rewrite_header(forge, b'"metadata":{}', b'"metadata":{"n":1e99999}')


@hostile
def header_that_is_not_utf8(forge: Forge) -> bool:
    return rewrite_header(forge, b'"kind":"regular"', b'"kind":"\xff\xfe"')


@hostile
def header_over_the_limit(forge: Forge) -> bool:
    os.truncate(forge.directory / "zarr.json", 2**40)
    return False


@ending_in("unsupported_format")
def header_of_a_newer_format(forge: Forge) -> None:
    forge.header |= {"format": 2, "whatever": True}


# -- the index -------------------------------------------------------------------------------------


@each(
    garbage=b"\xff\xfe",
    object=b"{}",
    empty=b"",
    short=b'[["state/big/c.0.0"]]',
    deep=b"[" * 50_000,
    parent=b'[["../../secret",1,"",""]]',
    twice=b'[["state/a",1,"",""],["state/a",1,"",""]]',
    utf8=b'[["\xce",1,"",""]]',
    negative=b'[["state/a",-1,"",""]]',
    huge=b'[["state/a",99999999999999999999999,"",""]]',
    itself=b'[["index/rank-00000/c.0",1,"",""]]',
    header=b'[["zarr.json",1,"",""]]',
)
def index(forge: Forge, payload: bytes) -> bool:
    forge.seal(payload)
    return False


@each(sparse=2**40, larger=2**26)
def file_larger_than_its_chunks(forge: Forge, num_bytes: int) -> None:
    os.truncate(forge.directory / "state/big/c.0.0", num_bytes)
    next(record for record in forge.records if record[0] == "state/big/c.0.0")[1] = num_bytes


@hostile
def index_lists_a_file_twice(forge: Forge) -> None:
    forge.records.append(["state/big/c.0.0", 3, "0" * 32, "0" * 32])


@hostile
def index_of_the_wrong_size(forge: Forge) -> bool:
    forge.seal()
    forge.header["indexes"][0]["bytes"] = 2**60
    forge.put_header()
    return False


@hostile
def index_far_over_the_limit(forge: Forge) -> bool:
    forge.seal()
    os.truncate(forge.directory / "index/rank-00000/c.0", 2**40)
    forge.header["indexes"][0]["bytes"] = 2**28
    forge.put_header()
    return False


# -- arrays ----------------------------------------------------------------------------------------


def grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def sharding(forge: Forge, **changes: Any) -> dict[str, Any]:
    codec = json.loads(forge.read("state/big/zarr.json"))["codecs"][0]
    return {"codecs": [{**codec, "configuration": {**codec["configuration"], **changes}}]}


@each(
    huge={"shape": [10**18]},
    huge_grid={"shape": [10**18, 1000]},
    many_files={"shape": [2**40, 1000], "chunk_grid": grid(1, 1000)},
    dimensions={"shape": [1] * 5000, "chunk_grid": grid(*[1] * 5000)},
    zero={"shape": [0, 1000]},
    negative={"shape": [-1, 1000]},
    chunk_zero={"chunk_grid": grid(0, 0)},
    chunk_huge={"chunk_grid": grid(2**50, 2**50)},
    chunk_text={"chunk_grid": grid()},
    type={"data_type": "object"},
    wide={"data_type": "complex128"},
    v2={"zarr_format": 2},
    group={"node_type": "group"},
    codecs={"codecs": []},
    codec_no_object={"codecs": [5]},
    codec_names={"codecs": [{"name": ["sharding_indexed"]}]},
    codec_pickle={"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "pickle"}]},
    many_codecs={"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *[{"name": "crc32c"}] * 30_000]},
    attributes={"attributes": 5},
    keys={"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
)
def array(forge: Forge, changes: dict[str, Any]) -> None:
    forge.edit("state/big", **changes)


@each(
    tiny={"chunk_shape": [1, 1]},
    empty={"chunk_shape": []},
    larger={"chunk_shape": [3000, 1000]},
    front={"index_location": "start"},
    nested={"codecs": [{"name": "sharding_indexed", "configuration": {}}]},
    zero={"chunk_shape": [0, 1000]},
)
def shard(forge: Forge, changes: dict[str, Any]) -> None:
    forge.edit("state/big", **sharding(forge, **changes))


@hostile
def array_with_a_member_twice(forge: Forge) -> None:
    data = forge.read("state/big/zarr.json")
    forge.put("state/big/zarr.json", data.replace(b'"zarr_format":3', b'"shape":[1,1],"zarr_format":3'))


@hostile
def array_metadata_over_the_limit(forge: Forge) -> None:
    forge.put("state/big/zarr.json", forge.read("state/big/zarr.json") + b" " * 2**21)


@hostile
def array_listed_without_its_chunks(forge: Forge) -> None:
    forge.records = [record for record in forge.records if record[0] != "state/big/c.0.0"]


@hostile
def arrays_that_exchanged_all_their_files(forge: Forge) -> None:
    first, second = "state/optimizer/exp_avg/weight", "state/quantized/values"
    for name in ("zarr.json", "c.0.0"):
        one, other = forge.read(f"{first}/{name}"), forge.read(f"{second}/{name}")
        forge.put(f"{first}/{name}", other)
        forge.put(f"{second}/{name}", one)


# -- chunks ----------------------------------------------------------------------------------------

_NUM_CHUNKS = 2


@each(
    negative=[(2**64 - 10, 20), (2**64 - 10, 20)],
    beyond=[(0, 2**63), (0, 10)],
    missing=[(2**64 - 1, 2**64 - 1)] * 2,
    overlapping=None,
    half_missing=[(2**64 - 1, 5), (0, 5)],
    empty=[(0, 0), (0, 0)],
)
def shard_index(forge: Forge, entries: list[tuple[int, int]] | None) -> None:
    stored = forge.read("state/big/c.0.0")
    end = len(stored) - _NUM_CHUNKS * 16 - 4
    if entries is None:
        first = struct.unpack("<QQ", stored[end : end + 16])
        entries = [first, first]
    index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    forge.put("state/big/c.0.0", stored[:end] + with_crc(index))


def put_chunk(forge: Forge, compressor: dict[str, Any], chunk: bytes) -> None:
    """Make ``state/plain/tensors/0`` (1600 bytes) one *chunk*."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, compressor, {"name": "crc32c"}]
    forge.edit("state/plain/tensors/0", codecs=codecs)
    forge.put("state/plain/tensors/0/c.0", with_crc(chunk))


BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "zstd", "clevel": 9, "shuffle": "noshuffle", "typesize": 8, "blocksize": 0},
}


def blosc_frame(num_bytes: int, **fields: int) -> bytes:
    frame = bytearray(blosc.compress(b"\0" * num_bytes, b"zstd", 9, blosc.NOSHUFFLE, 0, typesize=8))
    for name, value in fields.items():
        at = {"nbytes": 4, "blocksize": 8, "cbytes": 12}[name]
        frame[at : at + 4] = struct.pack("<I", value)
    return bytes(frame)


@each(
    bomb=blosc_frame(2**28),
    lies=blosc_frame(2**28, nbytes=1600),
    short=blosc_frame(800),
    announced=blosc_frame(1600, nbytes=2**31 - 1),
    blocks=blosc_frame(1600, blocksize=2**31 - 1),
    no_blocks=blosc_frame(1600, blocksize=0),
    size=blosc_frame(1600, cbytes=2**31 - 1),
    header=blosc_frame(1600)[:15],
    garbage=b"\2" * 64,
    nothing=b"",
)
def blosc_chunk(forge: Forge, chunk: bytes) -> None:
    put_chunk(forge, BLOSC, chunk)


@each(
    bomb=zstd.compress(b"\0" * 2**28, 1),
    short=zstd.compress(b"\0" * 800, 1),
    two=zstd.compress(b"\0" * 1600, 1) * 2,
    garbage=b"\x28\xb5\x2f\xfd" + b"\xff" * 40,
    cut=zstd.compress(b"\0" * 1600, 1)[:-3],
    nothing=b"",
    skippable=b"\x50\x2a\x4d\x18\xff\xff\xff\xff",
)
def zstd_chunk(forge: Forge, chunk: bytes) -> None:
    put_chunk(forge, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}, chunk)


def gzipped(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return compressor.compress(data) + compressor.flush()


@each(
    bomb=gzipped(b"\0" * 2**28),
    short=gzipped(b"\0" * 800),
    two=gzipped(b"\0" * 1600) * 2,
    cut=gzipped(b"\0" * 1600)[:-3],
    nothing=b"",
)
def gzip_chunk(forge: Forge, chunk: bytes) -> None:
    put_chunk(forge, {"name": "gzip", "configuration": {"level": 9}}, chunk)


# -- what is no file -------------------------------------------------------------------------------

SECRET = b"secret"


def replace_file(forge: Forge, make: Callable[[Path], object]) -> bool:
    path = forge.directory / "state/big/c.0.0"
    path.unlink()
    make(path)
    return False


@each(zero=os.makedev(1, 5), random=os.makedev(1, 9), tty=os.makedev(5, 0))
def device(forge: Forge, number: int) -> bool:
    if os.geteuid() != 0:
        pytest.skip("only root makes devices")
    return replace_file(forge, lambda path: os.mknod(path, 0o600 | 0o020000, number))


@hostile
def fifo(forge: Forge) -> bool:
    return replace_file(forge, os.mkfifo)


@hostile
def unix_socket(forge: Forge) -> bool:
    def bind(path: Path) -> None:
        folder = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself is longer than a socket's may be
        os.close(folder)

    return replace_file(forge, bind)


@hostile
def directory_in_place_of_a_file(forge: Forge) -> bool:
    return replace_file(forge, Path.mkdir)


@each(
    file="state/big/c.0.0",
    metadata="state/big/zarr.json",
    array="state/big",
    item="state/optimizer",
    state="state",
    index="index",
    rank="index/rank-00000",
    index_file="index/rank-00000/c.0",
    header="zarr.json",
    step="",
)
def symlink(forge: Forge, key: str) -> bool:
    """The same bytes, but outside: were the link followed, everything would match."""
    path = forge.directory / key
    outside = forge.directory.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside, target_is_directory=outside.is_dir())
    return False


@hostile
def hard_link_to_other_contents(forge: Forge) -> bool:
    outside = forge.directory.parent.parent / "outside"
    outside.write_bytes(SECRET)
    return replace_file(forge, lambda path: path.hardlink_to(outside))


# -- a step that is another ------------------------------------------------------------------------


@hostile
def step_under_another_number(forge: Forge) -> bool:
    other = forge.directory.with_name("step-00000006")
    victim.save(other.parent, 6, seed=3)
    shutil.rmtree(forge.directory)
    other.rename(forge.directory)
    return False


@hostile
def header_of_another_step(forge: Forge) -> bool:
    other = forge.directory.with_name("step-00000006")
    victim.save(other.parent, 6, seed=3)
    shutil.copy(other / "zarr.json", forge.directory / "zarr.json")
    shutil.rmtree(other)
    return False


@pytest.fixture(scope="module")
def outcomes(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """How the victim fared with each case; a case that killed it is missing."""
    folder = tmp_path_factory.mktemp("hostile")
    roots = {"untouched": str(pristine)}
    for number, (name, (tamper, _)) in enumerate(CASES.items()):
        root = folder / str(number) / "run"
        shutil.copytree(pristine, root)
        forge = Forge(root / "step-00000005")
        if tamper(forge) is not False:
            forge.seal()
        roots[name] = str(root)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", victim.__file__],
        input=json.dumps(roots),
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = dict(map(json.loads, done.stdout.splitlines()))
    found["end of the victim"] = {"returncode": done.returncode, "stderr": done.stderr}
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_step_ends_in_a_documented_error(outcomes: dict[str, dict[str, str]], name: str) -> None:
    assert name in outcomes, f"the victim died: {outcomes['end of the victim']}"
    found, code = outcomes[name], CASES[name][1]
    assert set(found.values()) <= ENDS, found
    assert found["load"] == code, found
    # What contradicts the live state is found before it is found to contradict itself.
    assert found["restore"] in (code, "state_mismatch"), found


@pytest.mark.parametrize("name", [name for name, (_, code) in CASES.items() if code == CORRUPT])
def test_verify_deep_finds_whatever_is_wrong_with_files(outcomes: dict[str, dict[str, str]], name: str) -> None:
    if name.partition("[")[0] in ("view", "value", "tree", "tensor", "quantized", "optimizer"):
        pytest.skip("what the tree says about sound arrays is for who loads it")
    assert outcomes[name]["deep"] in ("damaged", CORRUPT), outcomes[name]


def test_an_untouched_step_is_read(outcomes: dict[str, dict[str, str]]) -> None:
    assert set(outcomes["untouched"].values()) == {"ok"}
    assert outcomes["end of the victim"]["returncode"] == 0
