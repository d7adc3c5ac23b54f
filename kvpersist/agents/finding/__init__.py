"""How sessions, messages and tool calls are found."""
