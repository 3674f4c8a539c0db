"""What the driver knows of single frameworks and libraries, each loaded when it is first asked."""
