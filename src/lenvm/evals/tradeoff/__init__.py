"""Trade-off: how much accuracy does a shorter answer cost, arm by arm."""
