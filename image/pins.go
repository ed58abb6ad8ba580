package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Directories of the store with the records of containers, volumes and snapshots (distkit-layout(5)).
const (
	containersDir = "containers"
	volumesDir    = "volumes"
	snapshotsDir  = "snapshots"
)

// Pin is what a container protects from sweeps (distkit-layout(5), CONTAINERS).
type Pin struct {
	Namespace   string
	ID          string        // of the container
	Image       digest.Digest // its manifest or index; "" if it has none
	Snapshotter string        // driver of its snapshot; "" if it has none
	Snapshot    string        // key of its snapshot
}

// Pins returns the pins of the containers of all namespaces. FailedPrecondition if a record is malformed, because then
// nothing is known to be unused.
func Pins(store *content.Store) ([]Pin, error) {
	var pins []Pin
	namespaces, err := subdirs(store, containersDir)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	for _, namespace := range namespaces {
		ids, err := subdirs(store, path.Join(containersDir, namespace))
		if err != nil {
			return nil, fmt.Errorf("list containers: %w", err)
		}
		for _, id := range ids {
			b, err := store.Tree.ReadFile(path.Join(containersDir, namespace, id, "container.json"), maxRecord)
			if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("read container %s of namespace %s: %w", id, namespace, err)
			}
			var c struct {
				Image struct {
					Digest digest.Digest `json:"digest"`
				} `json:"image"`
				Snapshot struct {
					Driver string `json:"driver"`
					Key    string `json:"key"`
				} `json:"snapshot"`
			}
			if err := json.Unmarshal(b, &c); err != nil {
				return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "read container %s of namespace %s: %w", id, namespace, err)
			}
			pins = append(pins, Pin{namespace, id, c.Image.Digest, c.Snapshot.Driver, c.Snapshot.Key})
		}
	}
	return pins, nil
}

// maxRecord bounds the size of a container's record in bytes.
const maxRecord = 4 << 20

// subdirs returns the sorted names of the directories in a directory of the store, none if it doesn't exist. A symbolic
// link is FailedPrecondition: its target can't be trusted, but must not count as missing.
func subdirs(store *content.Store, dir string) ([]string, error) {
	d, err := store.Tree.OpenDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink != 0 {
			return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is a symbolic link, which is not followed: move here what it leads to, or mount it",
				store.Tree.Path(path.Join(dir, e.Name())))
		}
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}
