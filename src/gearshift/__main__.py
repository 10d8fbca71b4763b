"""Lets ``python -m gearshift`` do what the ``gearshift`` command does."""

from __future__ import annotations

from gearshift.cli import main

main()
