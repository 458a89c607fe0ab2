"""Configurations of other tools: one module of tables for each tool, and what is made of a file by them."""
