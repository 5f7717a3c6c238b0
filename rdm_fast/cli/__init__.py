"""The command lines: parsing, settings as flags, and the commands themselves."""
