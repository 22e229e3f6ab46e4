"""The version of quickthaw: the one place in the code (setup.cfg has it for the packages)."""

VERSION = "0.1.0"
