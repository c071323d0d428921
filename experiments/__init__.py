"""Figures, tables and measurements, drawn from workdirs."""
