package snapshot

// WholeTrees is how drivers show snapshots that each hold their whole tree: by a bind mount,
// of the parent's where it is a view of one.
type WholeTrees struct{}

// Mounts says how to show the snapshot.
func (WholeTrees) Mounts(t Tree) []Mount {
	access := "rw"
	if t.Kind == View {
		access = "ro"
	}
	return []Mount{{Type: "bind", Source: whole(t), Options: []string{"bind", access}}}
}

// Mount shows the snapshot at target.
func (WholeTrees) Mount(t Tree, target string) error {
	return BindMount(whole(t), target, t.Kind == View)
}

func whole(t Tree) string {
	if t.Kind == View && len(t.Parents) > 0 {
		return t.ParentFS()
	}
	return t.FS()
}
