"""One patch for many tokens: the mathematics of the joint rules."""
