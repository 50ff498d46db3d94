"""The papers' section 4 on any model: every route in a dtype, measured token by token."""
