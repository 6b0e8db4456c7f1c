"""The command line: ``compressed-format COMMAND``. It turns functions of this library into commands and prints.

Nothing is imported before a command needs it: ``check`` of a config answers without torch.
"""
