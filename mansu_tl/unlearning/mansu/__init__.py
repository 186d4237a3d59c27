"""MANSU: its settings, what is fixed before the first step (plan), the floor rule, the terms, the solver."""
