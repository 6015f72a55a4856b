"""From rows to what is read: statistics, verdicts, figures, pages, README.md. No torch."""
