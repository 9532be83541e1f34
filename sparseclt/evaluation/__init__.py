"""How good a CLT is: metrics, tables and plots."""
