"""Every state a file system may leave after a power cut, checked against the promises of the package.

A real program (`program`) saves, prunes and sets aside under strace (`trace`). Its system calls become
a history of changes and flushes (`history`), the history becomes crash states (`states`): after any
call, with any part of what was not flushed lost, torn or reordered. On each state the real package
looks for checkpoints (`promises`); what it finds is compared with what was written, not with what it
says. That the harness sees anything at all is shown by planting bugs (`mutants`) and damage
(`corruption`). The method is that of ALICE (Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al., OSDI 2018).
"""
