package snapshot

// OnStep sets the function that is called with the name of each step of a change.
func OnStep(f func(string)) { step = f }
