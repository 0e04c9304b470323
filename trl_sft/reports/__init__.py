"""Files of runs become tables and HTML pages; nothing here trains or loads a model."""
