"""How sessions, messages and tool calls are found.

``conditions`` what is asked of a record; ``choices`` which index answers most of it; ``sources`` where
records come from, in which order; ``queries`` find, page, iterate and count over any source; ``finder``
with ``sessions``, ``messages`` and ``calls`` how each kind is found.
"""
