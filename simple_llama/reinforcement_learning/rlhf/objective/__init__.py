"""What is minimised: losses of a pair's log-probs, the policy that gives them, and what they cost."""
