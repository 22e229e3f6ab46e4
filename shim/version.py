"""Holds the version of quickthaw, the only copy in the code (setup.cfg has it for the packages)."""

VERSION = "0.1.0"
