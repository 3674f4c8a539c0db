"""Backends: the only place, beside ``integrations``, where a framework's quirks live."""
