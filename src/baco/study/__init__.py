"""Human evaluation: a planned, blind study of a run's answers, from the plan to the report."""
