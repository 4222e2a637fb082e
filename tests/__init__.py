"""Claims about BACo's behaviour, made on real pairs."""
