"""Agents and what each keeps of itself: todos, snapshots, windows, recovered files, media."""
