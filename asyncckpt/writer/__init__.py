"""The background writer: its process, its protocol and its pipeline. Never imports torch."""
