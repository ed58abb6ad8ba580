package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/runtime/spec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Errors of a command that can't be executed, found before the container is made or reported by the runtime. Their
// statuses are docker's 127 and 126.
var (
	ErrCommandNotFound      = errors.New("not found in the container")
	ErrCommandNotExecutable = errors.New("not executable")
)

// bundle is an OCI bundle that has been checked.
type bundle struct {
	dir  string // absolute and without symbolic links, as runc requires
	spec specs.Spec
}

// realBundle returns a bundle's directory, absolute and without symbolic links.
func realBundle(dir string) (string, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return "", notFound("bundle %s: %v", dir, unix.ENOENT)
	}
	if err != nil {
		return "", fmt.Errorf("bundle %s: %w", dir, err)
	}
	return real, nil
}

// openBundle reads the config.json of the bundle in the directory real; messages call it dir, as the user does. To
// report errors early and clearly, it checks the root filesystem, the sources of bind mounts and the command.
func openBundle(real, dir string) (*bundle, error) {
	b, err := openBundleConfig(real, dir)
	if err != nil {
		return nil, err
	}
	return b, b.check(dir)
}

func openBundleConfig(real, dir string) (*bundle, error) {
	b := &bundle{dir: real}
	data, err := disk.Tree(real).ReadFile("config.json", spec.MaxDocument)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && len(data) == 0:
		return nil, notFound("bundle %s has no config.json: run-spec makes one", dir)
	case err != nil:
		return nil, fmt.Errorf("bundle %s: config.json %w", dir, disk.Cause(err))
	}
	if err := json.Unmarshal(data, &b.spec); err != nil {
		return nil, invalid("bundle %s: config.json: %v", dir, err)
	}
	if b.spec.Process == nil || len(b.spec.Process.Args) == 0 {
		return nil, invalid("bundle %s: config.json has no process", dir)
	}
	if b.spec.Root == nil || b.spec.Root.Path == "" {
		return nil, invalid("bundle %s: config.json has no root.path", dir)
	}
	return b, nil
}

// Command returns the command of the container's process from its configuration, or nil if that can't be read. A
// configuration outside of the container's directory is read only if this user made the container.
func (c *Container) Command() []string {
	tree, name := c.set.tree(), c.rel("config.json")
	if c.Bundle != "" {
		if !c.own {
			return nil
		}
		tree, name = disk.Tree(c.Bundle), "config.json"
	}
	f, err := tree.Open(name)
	if err != nil {
		return nil
	}
	defer f.Close()
	// Read by tokens: process comes early in the document, most of which is the system call filter.
	d := json.NewDecoder(io.LimitReader(f, spec.MaxDocument))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil
	}
	for d.More() {
		field, err := d.Token()
		if err != nil {
			return nil
		}
		if field != "process" {
			var skipped json.RawMessage
			if d.Decode(&skipped) != nil {
				return nil
			}
			continue
		}
		var p struct {
			Args []string `json:"args"`
		}
		_ = d.Decode(&p)
		return p.Args
	}
	return nil
}

func (b *bundle) check(name string) error {
	rootfs := b.inBundle(b.spec.Root.Path)
	root, err := os.OpenFile(rootfs, os.O_RDONLY|unix.O_DIRECTORY, 0) // O_DIRECTORY, because opening a FIFO would block
	if err == nil {
		defer root.Close()
		var info fs.FileInfo
		if info, err = root.Stat(); err == nil && !info.IsDir() {
			err = unix.ENOTDIR
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return notFound("bundle %s: no root filesystem at %s", name, rootfs)
	case err != nil:
		return fmt.Errorf("bundle %s: root filesystem: %w", name, err)
	}
	for _, m := range b.spec.Mounts {
		if !isBind(m) {
			continue
		}
		if _, err := os.Stat(b.inBundle(m.Source)); errors.Is(err, fs.ErrNotExist) {
			return notFound("mount on %s: no %s on this host", m.Destination, b.inBundle(m.Source))
		}
	}
	return b.checkCommand(root)
}

// isBind reports whether a mount is a bind mount, as runtimes do: by its options, or by its type alone.
func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// resolve makes the path of the root filesystem and the sources of bind mounts absolute.
func (b *bundle) resolve() {
	b.spec.Root.Path = b.inBundle(b.spec.Root.Path)
	for i, m := range b.spec.Mounts {
		if isBind(m) {
			b.spec.Mounts[i].Source = b.inBundle(m.Source)
		}
	}
}

// private writes the bundle, once resolved, for the runtime to a private directory and returns that. Nobody can change there what was
// checked. The cgroups are chosen here, whatever config.json says.
func (b *bundle) private(dir, cgroupsPath string) (string, error) {
	spec := b.spec
	linux := specs.Linux{}
	if spec.Linux != nil {
		linux = *spec.Linux
	}
	linux.CgroupsPath = cgroupsPath
	spec.Linux = &linux
	data, err := json.Marshal(spec)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600)
}

func (b *bundle) inBundle(p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(b.dir, p)
}

// checkCommand returns an error if the command certainly does not exist or is not executable. The runtime would report
// that too, but on the container's standard error.
func (b *bundle) checkCommand(root *os.File) error {
	p, name := b.spec.Process, b.command()[0]
	if b.spec.Hooks != nil || b.spec.Linux == nil {
		return nil
	}
	for _, m := range b.spec.Mounts {
		switch d := path.Clean(m.Destination); {
		case d == "/proc", d == "/sys", d == "/dev", strings.HasPrefix(d, "/sys/"), strings.HasPrefix(d, "/dev/"),
			d == "/etc/hosts", d == "/etc/resolv.conf", d == "/etc/hostname":
		default:
			return nil // the command may be in that mount, or a link may lead into it
		}
	}
	var candidates []string
	if strings.Contains(name, "/") {
		candidates = []string{path.Join("/", joinCwd(p.Cwd, name))}
	} else {
		for _, v := range p.Env {
			if dirs, ok := strings.CutPrefix(v, "PATH="); ok {
				candidates = candidates[:0]
				for _, d := range strings.Split(dirs, ":") {
					candidates = append(candidates, path.Join("/", joinCwd(p.Cwd, d), name))
				}
			}
		}
	}
	found := false
	for _, c := range candidates {
		f, err := spec.OpenInRoot(root, c)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			continue
		case err != nil:
			return nil // leave it to the runtime
		}
		info, err := f.Stat()
		f.Close()
		if err != nil {
			return nil //nolint:nilerr // likewise
		}
		if info.Mode().IsRegular() && info.Mode()&0o111 != 0 || under(c, "/proc", "/sys", "/dev") {
			return nil
		}
		found = true
	}
	if found {
		return commandError(name, ErrCommandNotExecutable)
	}
	return commandError(name, ErrCommandNotFound)
}

func commandError(name string, err error) error { return fmt.Errorf("command %q: %w", name, err) }

func joinCwd(cwd, p string) string {
	if path.IsAbs(p) {
		return p
	}
	return path.Join(cwd, p)
}

func under(p string, dirs ...string) bool {
	for _, d := range dirs {
		if strings.HasPrefix(p, d+"/") {
			return true
		}
	}
	return false
}

// Bundle returns a bundle's directory for a [Record]: absolute and without symbolic links. "" stays "", which means the
// container's own.
func Bundle(dir string) (string, error) {
	if dir == "" {
		return "", nil
	}
	return realBundle(dir)
}
