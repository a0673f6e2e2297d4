"""The report page of a run or a scan: one HTML file."""
