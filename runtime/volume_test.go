package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func openVolumes(t *testing.T) *Containers {
	t.Helper()
	s, err := Open(t.TempDir(), "default", filepath.Join(t.TempDir(), "state"), bound{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Of several processes that make a volume, one fills it. All of them use that one, and nothing else is left.
func TestVolumeOfMany(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			path, err := s.Volume(t.Context(), "db", func(dir *os.File) error {
				return os.WriteFile(filepath.Join(dir.Name(), "filled"), nil, 0o600)
			})
			if err != nil || path != filepath.Join(s.root, "volumes/default/db") {
				t.Errorf("%s: %v", path, err)
			}
			if _, err := os.Stat(filepath.Join(path, "filled")); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if names, err := os.ReadDir(filepath.Join(s.root, "volumes/default")); err != nil || len(names) != 1 {
		t.Errorf("%v are left: %v", names, err)
	}
	for _, dir := range s.volumeDirs("") {
		if fi, err := os.Stat(filepath.Join(s.root, dir)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v: %v", dir, fi.Mode(), err)
		}
	}
}

// A volume is filled once, completely or not at all, and kept while a container's record names it.
func TestVolumeLife(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	if _, err := s.Volume(t.Context(), "db", func(*os.File) error { return fs.ErrInvalid }); !errors.Is(err, fs.ErrInvalid) {
		t.Fatal(err)
	}
	if all, err := s.Volumes(); len(all) != 0 || err != nil {
		t.Fatalf("%v: %v", all, err)
	}
	empty := func(*os.File) error { return nil }
	if _, err := s.Volume(t.Context(), "db", empty); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Volume(t.Context(), "db", func(*os.File) error { return errors.New("filled again") }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), Record{ID: "user", Volumes: []string{"db"}}, "", nil); err != nil {
		t.Fatal(err)
	}
	all, err := s.Volumes()
	if err != nil || len(all) != 1 || strings.Join(all[0].Containers, " ") != "user" {
		t.Errorf("%v: %v", all, err)
	}
	if err := s.RemoveVolume(t.Context(), "db"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("one in use is removed: %v", err)
	}
	user, err := s.Get("user")
	if err == nil {
		_, err = user.proc("").Remove(t.Context(), false)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(s.root, "volumes/default", newVolume+"killed"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveVolume(t.Context(), "db"); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveVolume(t.Context(), "db"); !errdefs.IsNotFound(err) {
		t.Errorf("none is removed: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.root, "volumes")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directories are left: %v", err)
	}
}

// Volumes are made and removed by many at the same time: each that a container names is there, and a removal says no more than that one is
// used, or that there is none.
func TestVolumesComeAndGo(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	state := filepath.Join(t.TempDir(), "state")
	var makers, removers sync.WaitGroup
	made := make(chan struct{})
	for i := range 8 {
		s, err := Open(root, "default", state, bound{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprint("v", i/2%2)
		if i%2 == 0 {
			removers.Go(func() {
				for {
					if err := s.RemoveVolume(t.Context(), name); err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
						t.Errorf("remove: %v", err)
						return
					}
					select {
					case <-made:
						return
					default:
					}
				}
			})
			continue
		}
		makers.Go(func() {
			for range 12 {
				c, err := s.Create(t.Context(), Record{ID: fmt.Sprint("c", i), Volumes: []string{name}}, "", func(*Container) error {
					path, err := s.Volume(t.Context(), name, func(dir *os.File) error {
						return os.WriteFile(filepath.Join(dir.Name(), "filled"), nil, 0o600)
					})
					if err == nil {
						_, err = os.Stat(filepath.Join(path, "filled"))
					}
					return err
				})
				if err != nil {
					t.Errorf("create: %v", err)
					return
				}
				if _, err := os.Stat(filepath.Join(root, "volumes/default", name, "filled")); err != nil {
					t.Errorf("the volume of a container: %v", err)
				}
				if _, err := c.Remove(t.Context(), false); err != nil {
					t.Errorf("remove the container: %v", err)
				}
			}
		})
	}
	makers.Wait()
	close(made)
	removers.Wait()
}

// A maker that has waited for a directory which was removed meanwhile makes another one.
func TestVolumeInARemovedDirectory(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	lock, err := s.shareVolumes(t.Context())
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	made := make(chan error)
	go func() {
		_, err := s.Volume(t.Context(), "db", func(*os.File) error { return nil })
		made <- err
	}()
	until(t, "a maker that waits", func() bool {
		locks, err := os.ReadFile("/proc/locks")
		var st unix.Stat_t
		return err != nil || unix.Fstat(int(lock.Fd()), &st) != nil || waitsFor(string(locks), st.Ino)
	})
	if err := errors.Join(os.Remove(lock.Name()), os.Remove(filepath.Dir(lock.Name())), lock.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-made; err != nil {
		t.Error(err)
	}
	if all, err := s.Volumes(); err != nil || len(all) != 1 {
		t.Errorf("%v: %v", all, err)
	}
}

// waitsFor reports whether a line of /proc/locks is of a process that waits for the lock of a file.
func waitsFor(locks string, inode uint64) bool {
	for line := range strings.Lines(locks) {
		if strings.Contains(line, "->") && strings.Contains(line, fmt.Sprintf(":%d ", inode)) {
			return true
		}
	}
	return false
}

// A volume that is made removes what a killed maker of another one has left, and not what one that lives makes.
func TestVolumeOfAKilledMaker(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	names := func() (all []string) {
		entries, err := os.ReadDir(filepath.Join(s.root, "volumes/default"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, e.Name())
		}
		return all
	}
	_, err := s.Volume(t.Context(), "one", func(*os.File) error {
		left := filepath.Join(s.root, "volumes/default", newVolume+"killed")
		if err := os.MkdirAll(filepath.Join(left, "a/b"), 0o700); err != nil {
			return err
		}
		_, err := s.Volume(t.Context(), "two", func(*os.File) error { return nil })
		if _, serr := os.Stat(left); serr != nil {
			t.Errorf("removed while a volume is made: %v", serr)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Volume(t.Context(), "three", func(*os.File) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(names(), " "); got != "one three two" {
		t.Errorf("there are %s", got)
	}
}

// Names that are paths, and foreign files in a stranger's store of volumes, lead nowhere.
func TestVolumeHostile(t *testing.T) {
	t.Parallel()
	empty := func(*os.File) error { return nil }
	s := openVolumes(t)
	for _, name := range []string{"", ".", "..", "a/b", "/a", "../a", "a/../b", ".new-x", "a b", "a\n", strings.Repeat("a", 77)} {
		if _, err := s.Volume(t.Context(), name, empty); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
		if err := s.RemoveVolume(t.Context(), name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("remove %q: %v", name, err)
		}
	}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "kept"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(root string) error{
		"volume is a link":     func(root string) error { return os.Symlink(outside, filepath.Join(root, "volumes/default/db")) },
		"volume is a file":     func(root string) error { return os.WriteFile(filepath.Join(root, "volumes/default/db"), nil, 0o600) },
		"namespace is a link":  func(root string) error { return relink(outside, filepath.Join(root, "volumes/default")) },
		"volumes is a link":    func(root string) error { return relink(outside, filepath.Join(root, "volumes")) },
		"others may write":     func(root string) error { return os.Chmod(filepath.Join(root, "volumes/default"), 0o777) },
		"volumes is of others": func(root string) error { return os.Chmod(filepath.Join(root, "volumes"), 0o770) },
	} {
		s := openVolumes(t)
		if err := os.MkdirAll(filepath.Join(s.root, "volumes/default"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := make(s.root); err != nil {
			t.Fatal(err)
		}
		if path, err := s.Volume(t.Context(), "db", empty); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %s, %v", name, path, err)
		}
		_ = s.RemoveVolume(t.Context(), "db")
		if _, err := os.Stat(filepath.Join(outside, "kept")); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// Foreign files that a store's owner has put in place of a volume or a container's file are not opened.
func TestStoredFilesAreChecked(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	for name, change := range map[string]func(root string) error{
		"the last component is a link":   func(root string) error { return relink(outside, root) },
		"the first is a link":            func(root string) error { return relink(outside, filepath.Dir(filepath.Dir(root))) },
		"others may write above it":      func(root string) error { return os.Chmod(filepath.Dir(root), 0o777) },
		"the directory above is others'": func(root string) error { return os.Chown(filepath.Dir(root), 4711, 4711) },
		"it is a FIFO": func(root string) error {
			return errors.Join(os.RemoveAll(root), unix.Mkfifo(root, 0o600))
		},
	} {
		s := openVolumes(t)
		for _, rel := range []string{"volumes/default/db", "containers/default/one/hosts"} {
			path := filepath.Join(s.root, rel)
			if err := os.MkdirAll(path, 0o700); err != nil {
				t.Fatal(err)
			}
			parts, ok := s.stored(path)
			if !ok {
				t.Fatalf("%s is not of the store", path)
			}
			f, err := s.openStored(parts)
			if err != nil {
				t.Fatal(err)
			}
			_ = f.Close()
			if err := change(path); err != nil {
				if errors.Is(err, fs.ErrPermission) { // only root can give files away
					continue
				}
				t.Fatal(err)
			}
			if f, err := s.openStored(parts); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s: %s: %v, %v", rel, name, f, err)
			}
		}
	}
	s := openVolumes(t)
	for _, path := range []string{"/", "/etc", s.root, s.root + "/volumes/default", s.root + "/volumes/default/db/x", s.root + "/containers/default/x", s.root + "/../volumes/a/b", "volumes/a/b"} {
		if parts, ok := s.stored(path); ok {
			t.Errorf("%s is %q of the store", path, parts)
		}
	}
}

func relink(target, name string) error {
	if err := os.RemoveAll(name); err != nil {
		return err
	}
	return os.Symlink(target, name)
}

// swapAt has a process of the test binary replace a path of the store by a link at a step of a run, until it has started: PATH|TARGET|STEP.
const swapAt = "TEST_SWAP"

func init() {
	f := strings.Split(os.Getenv(swapAt), "|")
	if len(f) != 3 {
		return
	}
	path, target, when := f[0], f[1], f[2]
	atStep = func(step string) {
		var err error
		switch step {
		case when:
			if err = os.Rename(path, path+".aside"); err == nil {
				err = os.Symlink(target, path)
			}
		case "started":
			if err = os.Remove(path); err == nil {
				err = os.Rename(path+".aside", path)
			}
		}
		if err != nil {
			panic(err)
		}
	}
}

// A container gets the volume and files that were checked, whatever the store's owner replaces them with during the
// start. The host has no mount of them.
func TestStoredFilesStayThoseThatWereChecked(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		outside := t.TempDir()
		testenv.Write(t, filepath.Join(outside, "file"), "the host's")
		testenv.Write(t, filepath.Join(outside, "default/db/file"), "the host's")
		testenv.Write(t, filepath.Join(outside, "default/test-swap/hosts"), "the host's")
		all := m.containers()
		if err := os.MkdirAll(all.root, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Dir(m.bundle), 0o711); err != nil { // root of the user namespace must be able to reach the root filesystem
			t.Fatal(err)
		}
		for _, name := range []string{"proc", "dev", "sys", "data", "etc"} { // which it can't make
			if err := os.Mkdir(filepath.Join(m.bundle, "rootfs", name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		testenv.Write(t, filepath.Join(m.bundle, "rootfs/etc/hosts"), "")
		volume, err := all.Volume(t.Context(), "db", func(dir *os.File) error {
			return os.WriteFile(filepath.Join(dir.Name(), "file"), []byte("the volume's"), 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, swap := range []string{"volumes/default/db|" + outside, "volumes|" + outside, "containers|" + outside} {
			for _, userns := range []bool{false, true} {
				r := Record{ID: "test-swap", Bundle: m.bundle, Volumes: []string{"db"}}
				if userns {
					r.Users = AutoUsers
				}
				c, err := all.Create(t.Context(), r, "", nil)
				if err != nil {
					t.Fatal(err)
				}
				testenv.Write(t, filepath.Join(c.Dir(), "hosts"), "the container's")
				hosts, err := filepath.Rel(m.bundle, filepath.Join(c.Dir(), "hosts"))
				if err != nil {
					t.Fatal(err)
				}
				o := spec.Options{Args: []string{"sh", "-c", "cat /data/file /etc/hosts; echo; echo heard >/data/heard; echo done; exec sleep 1000"}, Mounts: []specs.Mount{
					{Type: "none", Source: volume, Destination: "/data", Options: []string{"rbind"}},
					{Type: "bind", Source: hosts, Destination: "/etc/hosts", Options: []string{"rbind", "ro"}},
				}}
				o.UserNS.Auto = userns
				m.spec(o)
				start := m.as("start", c.ID, "")
				start.Env = append(start.Env, swapAt+"="+filepath.Join(all.root, swap)+"|ready")
				if out, err := start.CombinedOutput(); err != nil {
					t.Errorf("%s: %v: %s", swap, err, out)
				} else {
					until(t, "output", func() bool { return strings.Contains(m.log(c), "done\n") })
					if got := m.log(c); strings.Contains(got, "the host's") || !strings.Contains(got, "the volume's") || !strings.Contains(got, "the container's") {
						t.Errorf("%s: it has %q", swap, got)
					}
				}
				if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), m.state) {
					t.Errorf("%s: the host has mounts in %s: %v", swap, m.state, err)
				}
				if _, err := c.Remove(t.Context(), true); err != nil {
					t.Error(err)
				}
				// Owners in a volume are those of the container's user namespace.
				var heard unix.Stat_t
				if err := unix.Stat(filepath.Join(volume, "heard"), &heard); err != nil || heard.Uid != 0 || heard.Gid != 0 {
					t.Errorf("%s, user namespace %v: a file of its root's is %d:%d's: %v", swap, userns, heard.Uid, heard.Gid, err)
				}
				if err := os.Remove(filepath.Join(volume, "heard")); err != nil {
					t.Error(err)
				}
			}
		}
		if left, err := os.ReadDir(filepath.Join(outside)); err != nil || len(left) != 2 {
			t.Errorf("the host has %v: %v", left, err)
		}
	})
}

// A container has the root filesystem and the configuration of the directory that its record is sealed for, whatever the store's owner puts
// in its place while it is started. Nothing is mounted there.
func TestContainerStaysTheOneThatWasChecked(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		testenv.Write(t, filepath.Join(m.bundle, "rootfs/mark"), "the image's")
		if err := os.Chmod(filepath.Dir(m.bundle), 0o711); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"proc", "dev", "sys"} { // which root of a user namespace can't make
			if err := os.Mkdir(filepath.Join(m.bundle, "rootfs", name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		outside := t.TempDir()
		stranger := filepath.Join(outside, "default/test-swap")
		if err := os.CopyFS(filepath.Join(stranger, "rootfs"), os.DirFS(filepath.Join(m.bundle, "rootfs"))); err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, filepath.Join(stranger, "rootfs/mark"), "the host's")
		m.spec(spec.Options{Args: []string{"sh", "-c", `echo "the host's"; exec sleep 1000`}})
		b, err := os.ReadFile(filepath.Join(m.bundle, "config.json"))
		if err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, filepath.Join(stranger, "config.json"), string(b))
		for _, users := range []string{"", AutoUsers} {
			for _, step := range []string{"ready", "blank", "mounted"} {
				o := spec.Options{Args: []string{"sh", "-c", "cat /mark; echo; exec sleep 1000"}}
				o.UserNS.Auto = users != ""
				m.spec(o)
				c := m.snapshotted("test-swap", Record{Users: users})
				containers := filepath.Join(m.bound().root, "containers")
				start := m.as("start", c.ID, "")
				start.Env = append(start.Env, swapAt+"="+containers+"|"+outside+"|"+step)
				out, err := start.CombinedOutput()
				if step == "ready" {
					if err != nil {
						t.Errorf("users %q: %v: %s", users, err, out)
					}
					until(t, "output", func() bool { return err != nil || strings.Contains(m.log(c), "'s\n") })
					if got := m.log(c); !strings.Contains(got, "the image's") {
						t.Errorf("users %q: it has %q", users, got)
					}
				} else if rerr := errors.Join(os.Remove(containers), os.Rename(containers+".aside", containers)); err == nil || rerr != nil {
					t.Errorf("users %q: swapped when it is %s, it is started: %s: %v", users, step, out, rerr)
				}
				if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), outside) {
					t.Errorf("users %q, %s: something is mounted in %s: %v", users, step, outside, err)
				}
				if _, err := c.Remove(t.Context(), true); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// A container gets the root filesystem that its configuration names, also if that is another container's.
func TestRootOfAnotherContainer(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		all := m.containers()
		one, err := all.Create(t.Context(), Record{ID: "test-one"}, "", nil)
		if err == nil {
			err = os.Remove(one.path("rootfs"))
		}
		if err == nil {
			err = os.Rename(filepath.Join(m.bundle, "rootfs"), one.path("rootfs"))
		}
		if err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, one.path("rootfs", "mark"), "of the one")
		two, err := all.Create(t.Context(), Record{ID: "test-two"}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		m.spec(spec.Options{Args: []string{"cat", "/mark"}})
		b, err := os.ReadFile(filepath.Join(m.bundle, "config.json"))
		if err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, two.path("config.json"), strings.Replace(string(b), `"path":"rootfs"`, `"path":"`+one.path("rootfs")+`"`, 1))
		if out, err := m.as("start", two.ID, "").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		} else {
			until(t, "the mark", func() bool { return strings.Contains(m.log(two), "of the one") })
		}
		for _, c := range []*Container{two, one} {
			if _, err := c.Remove(t.Context(), true); err != nil {
				t.Error(err)
			}
		}
	})
}

// A new container's root filesystem is mounted in the container's directory, or nowhere, whatever the store's owner
// replaces that with meanwhile. The same is true of its unmounting.
func TestRootIsMountedInTheStore(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		if m.runtime != "runc" { // none takes part in this
			return
		}
		outside := t.TempDir()
		rootfs := filepath.Join(outside, "default/test-swap/rootfs")
		if err := os.MkdirAll(filepath.Dir(rootfs), 0o700); err != nil {
			t.Fatal(err)
		}
		all := m.bound()
		if err := os.MkdirAll(all.root, 0o700); err != nil {
			t.Fatal(err)
		}
		containers := filepath.Join(all.root, "containers")
		for _, when := range []string{"configured", "prepared"} {
			create := m.as("create", "test-swap", "")
			create.Env = append(create.Env, swapAt+"="+containers+"|"+outside+"|"+when)
			out, _ := create.CombinedOutput() // its status tells only that the run has none
			if when == "configured" && len(out) == 0 {
				t.Error("a container is made in a directory that was replaced")
			}
			if mounted(rootfs) {
				t.Errorf("%s: it is mounted outside of the store: %s", when, out)
				if err := unix.Unmount(rootfs, 0); err != nil {
					t.Fatal(err)
				}
			}
			if when == "configured" {
				if names, err := os.ReadDir(filepath.Dir(rootfs)); err != nil || len(names) > 0 {
					t.Errorf("outside of the store there is %v: %v", names, err)
				}
			} else {
				// Another mount there stays.
				if err := errors.Join(os.MkdirAll(rootfs, 0o700), unix.Mount(outside, rootfs, "", unix.MS_BIND, "")); err != nil {
					t.Fatal(err)
				}
				c := &Container{Record: Record{ID: "test-swap", Namespace: "default"}, dir: filepath.Join(all.dir(), "test-swap"), set: all}
				if err := c.UnmountRoot(); err == nil || !mounted(rootfs) {
					t.Errorf("what is mounted outside of the store is unmounted: %v", err)
				}
				_ = unix.Unmount(rootfs, 0)
			}
			if err := errors.Join(os.Remove(containers), os.Rename(containers+".aside", containers)); err != nil {
				t.Fatal(err)
			}
			c, err := all.Any("test-swap")
			if err == nil {
				_, err = c.Remove(t.Context(), true)
			}
			if err != nil && !errdefs.IsNotFound(err) {
				t.Error(err)
			}
		}
	})
}

// What another container is given comes from the directory that was checked, and not from one that replaced it.
func TestSharedIsSealed(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	c, err := s.Create(t.Context(), Record{ID: "one"}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	config := `{"process":{"args":["true"]},"root":{"path":"rootfs"},"hostname":"h","mounts":[{"destination":"/etc/hosts","source":"hosts","options":["rbind"]}]}`
	testenv.Write(t, c.path("config.json"), config)
	name, files, err := c.Shared()
	if err != nil || name != "h" || len(files) != 1 || files[0].Source != c.path("hosts") {
		t.Errorf("%s, %v: %v", name, files, err)
	}
	if err := os.Rename(c.Dir(), c.Dir()+".aside"); err != nil {
		t.Fatal(err)
	}
	testenv.Write(t, c.path("config.json"), strings.Replace(config, `"hosts"`, `"/etc/shadow"`, 1))
	if _, files, err := c.Shared(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another directory gives %v: %v", files, err)
	}
}
