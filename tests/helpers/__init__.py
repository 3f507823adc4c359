"""What several tests share: independent oracles, tiny networks and trainings, cases."""
