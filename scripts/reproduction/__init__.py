"""The paper's tables and figures as data, and their rendering beside what is measured."""
