"""The guard itself: session, check, observation, cadence, state and faults."""
