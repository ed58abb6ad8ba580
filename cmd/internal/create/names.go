package create

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"

	"distkit/disk"
	"distkit/runtime"
	"distkit/runtime/spec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// nameFiles are the files that resolve names, by their paths in the container.
type nameFiles struct {
	made  map[string]string // paths of files that run-net makes with the network
	texts map[string]string // texts of files that are made in the container's directory

	mounts []specs.Mount // mounts of files of another container
}

// newNameFiles returns the files for a container without a network of run-net. In the host's network the container gets
// the host's own files, unless names adds to them.
func newNameFiles(names spec.Names, host bool) (nameFiles, error) {
	if err := names.Check(); err != nil {
		return nameFiles{}, err
	}
	texts := map[string]string{"/etc/hostname": names.Hostname + "\n"}
	var err error
	switch {
	case !host:
		texts["/etc/hosts"], err = names.HostsFile(nil, "")
	case len(names.Hosts) > 0:
		var b []byte
		if b, err = readHost("/etc/hosts"); err == nil {
			texts["/etc/hosts"], err = names.AddHosts(string(b))
		}
	}
	if err != nil {
		return nameFiles{}, err
	}
	if names.Resolves() {
		b, err := readHost("/etc/resolv.conf")
		if err != nil {
			return nameFiles{}, err
		}
		texts["/etc/resolv.conf"], _ = names.ResolvConf(string(b), !host)
	}
	return nameFiles{texts: texts}, nil
}

// readHost reads a file of the host that may be missing.
func readHost(name string) ([]byte, error) {
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// write writes the files that are made in the container's directory. Any user of the container may read them.
func (f nameFiles) write(c *runtime.Container) error {
	for name, text := range f.texts {
		err := disk.Tree(c.Dir()).ReplaceBy(path.Base(name), 0o644, !c.RemoveAtEnd, func(f *os.File) error {
			_, err := f.WriteString(text)
			return errors.Join(err, f.Chmod(0o644)) // whatever the umask is
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// mount adds the files to the mounts. The caller's mounts come after them, since the last of several on one path
// counts. As in docker, the container may write to the files unless its root filesystem is read-only.
func (f nameFiles) mount(c *runtime.Container, o spec.Options) spec.Options {
	access := "rw"
	if o.ReadOnly {
		access = "ro"
	}
	mounts := f.mounts
	if o.ReadOnly {
		for i, m := range mounts {
			mounts[i].Options = append(slices.Clone(m.Options), "ro")
		}
	}
	for _, name := range spec.NameFiles {
		source, ok := f.made[name]
		if _, local := f.texts[name]; local {
			source, ok = filepath.Join(c.Dir(), path.Base(name)), true
		}
		if ok {
			mounts = append(mounts, specs.Mount{Destination: name, Type: "bind", Source: source, Options: []string{"rbind", "rprivate", access}})
		}
	}
	o.Mounts = append(mounts, o.Mounts...)
	return o
}
