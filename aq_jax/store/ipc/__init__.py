"""Tables in Arrow IPC files."""
