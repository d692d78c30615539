"""Text into batches: formats, chat templates and loss masks, packing into a few static shapes."""
