package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Pin is what a container keeps from a sweep: distkit-layout(5), CONTAINERS.
type Pin struct {
	Namespace   string
	ID          string        // of the container
	Image       digest.Digest // of its manifest or index, if any
	Snapshotter string        // driver of its snapshot, if any
	Snapshot    string        // key of its snapshot
}

// Pins returns what the containers of all namespaces keep. FailedPrecondition where one of them
// does not parse: then nothing is known to be free.
func Pins(store *content.Store) ([]Pin, error) {
	var pins []Pin
	top := filepath.Join(store.Root(), "containers")
	namespaces, err := subdirs(top)
	if err != nil {
		return nil, err
	}
	for _, namespace := range namespaces {
		ids, err := subdirs(filepath.Join(top, namespace))
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			b, err := os.ReadFile(filepath.Join(top, namespace, id, "container.json"))
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

// subdirs are the names of the directories in dir, none where it isn't there.
func subdirs(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
