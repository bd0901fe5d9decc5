"""Speed measured beside real peers, and the papers' figures drawn from measurements on the device at hand."""
