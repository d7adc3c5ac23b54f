"""Sessions and what belongs to them: messages, tool calls, confirmations, traces."""
