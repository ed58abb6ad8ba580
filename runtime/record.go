package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"distkit/disk"
	"distkit/events"
	"distkit/runtime/spec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Record is what container.json says about a container (distkit-layout(5), containers).
type Record struct {
	ID          string            `json:"id"`
	Namespace   string            `json:"namespace"`
	Created     time.Time         `json:"created"`
	Image       *ImageName        `json:"image,omitempty"`
	Snapshot    *Snapshot         `json:"snapshot,omitempty"`
	Bundle      string            `json:"bundle,omitempty"`  // "" means the container's directory
	Runtime     string            `json:"runtime,omitempty"` // name or path of the runtime, for [Find]
	Labels      map[string]string `json:"labels,omitempty"`
	Interactive bool              `json:"interactive,omitempty"` // the process has an input when detached
	RemoveAtEnd bool              `json:"remove,omitempty"`
	LogSize     int64             `json:"logSize,omitempty"` // 0 means 16 MiB
	Network     string            `json:"network,omitempty"` // path of a network namespace that is connected while the container runs, and removed with it
	// Namespaces are the namespaces of other containers that this one joins at each run: kinds and IDs.
	Namespaces  map[specs.LinuxNamespaceType]string `json:"namespaces,omitempty"`
	Users       string                              `json:"users,omitempty"`       // whose user namespace it uses: AutoUsers, MappedUsers, or "" for the caller's
	Owner       *HostProcess                        `json:"owner,omitempty"`       // process that makes the container and will run it
	Connection  *Connection                         `json:"connection,omitempty"`  // how to make the network again after a boot
	Volumes     []string                            `json:"volumes,omitempty"`     // names of the volumes that it mounts; they can't be removed
	Healthcheck *spec.Healthcheck                   `json:"healthcheck,omitempty"` // the image's
	Secrets     []string                            `json:"secrets,omitempty"`     // names of its secrets in SecretsDir
	Stored      bool                                `json:"stored,omitempty"`      // its first run restores the checkpoint in its directory
	Seal        string                              `json:"seal,omitempty"`        // proof that this user made it on this host
}

// Connection is a request to CNI for a container's network.
type Connection struct {
	Name    string   `json:"name"`              // name of the configuration, or absolute path of its file
	ConfDir string   `json:"confDir,omitempty"` // directory of configurations, absolute
	Ports   []string `json:"ports,omitempty"`   // [IP:]HOST:CONTAINER/PROTOCOL
	spec.Names
}

// NetworkPlan describes a network that run-net can make.
type NetworkPlan struct {
	Path       string            `json:"path"` // of its namespace
	Connection Connection        `json:"connection"`
	Files      map[string]string `json:"files"` // files that resolve names, by their paths in a container
}

// ImageName names the image that a container is made from.
type ImageName struct {
	Name   string `json:"name,omitempty"`
	Digest string `json:"digest"` // of the manifest or index
}

// Snapshot is a container's root filesystem.
type Snapshot struct {
	Driver string `json:"driver,omitempty"`
	Key    string `json:"key"`
}

// write makes the record visible.
func (c *Container) write() error {
	for k, v := range c.Labels {
		if err := spec.CheckText("label", k+v); err != nil {
			return err
		}
		if len(k)+len(v) > 4096 {
			return invalid("label %.60q: key and value take more than 4096 bytes together", k)
		}
	}
	if c.own {
		key, err := userKey(c.set.state)
		if err == nil {
			var dir identity
			if dir, err = identify(c.dir); err == nil {
				c.Seal, err = c.seal(key, dir)
			}
		}
		if err != nil {
			return err
		}
	}
	b, err := json.Marshal(c.Record)
	if err != nil {
		return err
	}
	if err := c.set.tree().Replace(c.rel("container.json"), append(b, '\n'), 0o600, !c.RemoveAtEnd); err != nil || c.RemoveAtEnd {
		return err
	}
	for dir := c.dir; dir != filepath.Dir(c.set.root); dir = filepath.Dir(dir) {
		if err := disk.SyncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// readRecord is read without checking the seal.
func (s *Containers) readRecord(id string) (*Container, error) {
	c := &Container{Record: Record{ID: id}, dir: filepath.Join(s.dir(), id), set: s}
	if err := s.check(id); err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	b, err := s.tree().ReadFile(c.rel("container.json"), maxFile)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 {
		return nil, notFound("no container %s", id)
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	if err := json.Unmarshal(b, &c.Record); err != nil {
		return nil, failed("container %s: container.json: %w", id, err)
	}
	// The record's own ID and namespace are ignored, since the directory may have been renamed.
	c.ID, c.Namespace = id, s.namespace
	return c, nil
}

// maxFile bounds the size of a container's small files.
const maxFile = 1 << 20

// Label sets labels and returns all. An empty value removes a label.
func (c *Container) Label(labels map[string]string) (map[string]string, error) {
	err := c.change(func(r *Record) error {
		if r.Labels == nil {
			r.Labels = map[string]string{}
		}
		for k, v := range labels {
			if v == "" {
				delete(r.Labels, k)
				continue
			}
			r.Labels[k] = v
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("label container %s: %w", c.ID, err)
	}
	c.log(events.Event{Topic: "/containers/update", Labels: c.Labels})
	return c.Labels, nil
}

// lockRecord locks the record's file against changes and removal of the container. NotFound: there is none.
func (c *Container) lockRecord() (*os.File, error) {
	lock, err := lockFile(c.set.tree(), c.rel("container.json"), false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("no container %s", c.ID)
	}
	return lock, err
}

// change changes the record while it is locked.
func (c *Container) change(f func(*Record) error) error {
	if err := c.set.secure(c.ID); err != nil {
		return err
	}
	lock, err := c.lockRecord()
	if err != nil {
		return err
	}
	defer lock.Close()
	now, err := c.set.read(c.ID)
	if err != nil {
		return err
	}
	if err := f(&now.Record); err != nil {
		return err
	}
	if err := now.write(); err != nil {
		return err
	}
	c.Record, c.own = now.Record, now.own
	return nil
}

// Field returns the fields that containerd's filters know: id, image, runtime, labels.KEY, and snapshot, snapshotter
// and status as in [Info].
func (r Record) Field(path []string) (string, bool) {
	value := ""
	switch {
	case len(path) > 1 && path[0] == "labels":
		value, ok := r.Labels[strings.Join(path[1:], ".")]
		return value, ok
	case slices.Equal(path, []string{"id"}):
		value = r.ID
	case slices.Equal(path, []string{"runtime"}):
		value = r.Runtime
	case r.Image != nil && (slices.Equal(path, []string{"image"}) || slices.Equal(path, []string{"image", "name"})):
		value = r.Image.Name
	case r.Image != nil && slices.Equal(path, []string{"image", "digest"}):
		value = r.Image.Digest
	case r.Snapshot != nil && slices.Equal(path, []string{"snapshot"}):
		value = r.Snapshot.Key
	case r.Snapshot != nil && slices.Equal(path, []string{"snapshotter"}):
		value = r.Snapshot.Driver
	}
	return value, value != ""
}
