"""The stages: functions with plain arguments, for the command line and for notebooks."""
