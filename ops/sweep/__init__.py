"""Many runs of one purse: which run next, with how much, and which to end early."""
