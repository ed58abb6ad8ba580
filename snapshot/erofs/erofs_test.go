package erofs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"distkit/archive"
	image "distkit/erofs"
	"distkit/snapshot"
	"distkit/snapshot/erofs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func diff(ctx context.Context, upper *os.File, w io.Writer) error {
	_, err := archive.Diff(ctx, w, "", fmt.Sprintf("/proc/self/fd/%d/.", upper.Fd()), archive.DiffOptions{Overlay: true, Compression: archive.Uncompressed})
	return err
}

func TestMain(m *testing.M) {
	snapshottest.Diff = diff
	snapshottest.Main(m, erofs.Driver{})
}

func need(t *testing.T) {
	t.Helper()
	snapshottest.Root(t)
	snapshottest.Require(t, "erofs", erofs.Driver{}.Check(t.Context(), t.TempDir()))
}

func TestSuite(t *testing.T) {
	need(t)
	snapshottest.Run(t, erofs.Driver{})
}

// A store wraps the snapshots of a test.
type store struct {
	*snapshot.Snapshotter
	t   *testing.T
	dir string
}

func newStore(t *testing.T, root string) store {
	t.Helper()
	s, err := snapshot.Open(root, erofs.Driver{}, snapshot.Options{NoSync: true, Diff: diff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { clear(s) }) // seals are outside the store, and are removed with the snapshots
	return store{s, t, filepath.Join(root, "snapshots", erofs.Name)}
}

// clear removes all snapshots.
func clear(s *snapshot.Snapshotter) {
	var keys []string
	_ = s.Walk(context.Background(), func(_ context.Context, i snapshot.Info) error {
		keys = append(keys, i.Key)
		return nil
	})
	r := s.Remover()
	for _, key := range slices.Backward(keys) {
		_ = r.Remove(context.Background(), key)
	}
}

// stack makes a chain of layers from maps of files, and returns the name of the topmost snapshot.
func (s store) stack(layers ...map[string]string) string {
	s.t.Helper()
	var list []snapshot.Layer
	for i, files := range layers {
		list = append(list, snapshot.Layer{Name: fmt.Sprintf("layer %d", i+1), Apply: func(ctx context.Context, p snapshot.Place) error {
			if p.Whiteouts != snapshot.ArchiveForm || p.Unresolved != "" {
				return fmt.Errorf("a layer is wanted in the form %q", p.Whiteouts)
			}
			if err := os.Mkdir(p.Dir, 0o755); err != nil {
				return err
			}
			_, err := image.Store(ctx, p.Dir, bytes.NewReader(pack(s.t, files)), image.StoreOptions{})
			return err
		}})
	}
	if err := s.Stack(s.t.Context(), "", list, 8, func(string) error { return nil }); err != nil {
		s.t.Fatal(err)
	}
	return list[len(list)-1].Name
}

func pack(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, body := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read returns the files that a view of a snapshot shows, with their contents.
func (s store) read(name string) (string, error) {
	s.t.Helper()
	ctx, mnt := s.t.Context(), s.t.TempDir()
	if _, err := s.View(ctx, "view", name, nil); err != nil {
		return "", err
	}
	defer func() {
		if err := s.Remove(ctx, "view"); err != nil {
			s.t.Error(err)
		}
	}()
	if err := s.Mount(ctx, "view", mnt); err != nil {
		return "", err
	}
	defer func() {
		if err := snapshot.Unmount(mnt); err != nil {
			s.t.Error(err)
		}
	}()
	var all []string
	list, err := os.ReadDir(mnt)
	for _, e := range list {
		b, rerr := os.ReadFile(filepath.Join(mnt, e.Name()))
		err = errors.Join(err, rerr)
		all = append(all, e.Name()+"="+string(b))
	}
	return strings.Join(all, " "), err
}

func (s store) expect(name, want string) {
	s.t.Helper()
	if got, err := s.read(name); err != nil || got != want {
		s.t.Errorf("%s shows %q, not %q: %v", name, got, want, err)
	}
}

// one returns the only file of the snapshots that matches a pattern.
func (s store) one(pattern string) string {
	s.t.Helper()
	found, err := filepath.Glob(filepath.Join(s.dir, pattern))
	if err != nil || len(found) != 1 {
		s.t.Fatalf("%s: %q, %v", pattern, found, err)
	}
	return found[0]
}

// An image of unknown origin is never mounted, but made again.
func TestForeignImage(t *testing.T) {
	need(t)
	s := newStore(t, t.TempDir())
	name := s.stack(map[string]string{"a": "1", "b": "1"}, map[string]string{"b": "2", ".wh.a": ""})
	s.expect(name, "b=2")
	file := s.one("*/image")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	for i := 1024; i < len(bad); i += 7 {
		bad[i] ^= 0xff
	}
	for what, change := range map[string]func() error{
		"written to": func() error { return os.WriteFile(file, bad, 0o400) },
		"replaced":   func() error { return errors.Join(os.Remove(file), os.WriteFile(file, bad, 0o400)) },
		"with its times": func() error {
			var st unix.Stat_t
			return errors.Join(unix.Stat(file, &st), os.WriteFile(file, bad, 0o400), unix.UtimesNano(file, []unix.Timespec{st.Atim, st.Mtim}))
		},
		"a directory": func() error {
			return errors.Join(os.Remove(file), os.Mkdir(file, 0o700), os.WriteFile(file+"/x", nil, 0o600))
		},
		"a pipe":  func() error { return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o600)) },
		"a link":  func() error { return errors.Join(os.Remove(file), os.Symlink("/dev/zero", file)) },
		"missing": func() error { return os.Remove(file) },
	} {
		if err := change(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		s.expect(name, "b=2")
		if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, good) {
			t.Errorf("%s: the image is not what it was: %v", what, err)
		}
	}
}

// A change to a stored layer is detected before anything is mounted.
func TestDamagedLayer(t *testing.T) {
	need(t)
	for what, change := range map[string]func(dir string) error{
		"content": func(dir string) error {
			return edit(dir+"/layer.tar", func(b []byte) []byte { b[512] ^= 1; return b })
		},
		"header":    func(dir string) error { return edit(dir+"/layer.tar", func(b []byte) []byte { b[0] = 'z'; return b }) },
		"cut short": func(dir string) error { return os.Truncate(dir+"/layer.tar", 512) },
		"empty":     func(dir string) error { return os.Truncate(dir+"/layer.tar", 0) },
		"missing":   func(dir string) error { return os.Remove(dir + "/layer.tar") },
		"a link": func(dir string) error {
			return errors.Join(os.Remove(dir+"/layer.tar"), os.Symlink("/dev/zero", dir+"/layer.tar"))
		},
		"other name": func(dir string) error {
			return edit(dir+"/diffid", func(b []byte) []byte { b[10] = 'a' + (b[10]+1)%2; return b })
		},
		"no name":     func(dir string) error { return os.Truncate(dir+"/diffid", 0) },
		"not its own": func(dir string) error { return os.RemoveAll(dir) },
	} {
		t.Run(what, func(t *testing.T) {
			s := newStore(t, t.TempDir())
			name := s.stack(map[string]string{"a": "1"}, map[string]string{"b": "2"})
			s.expect(name, "a=1 b=2")
			if _, err := s.Prepare(t.Context(), "before", name, nil); err != nil {
				t.Fatal(err)
			}
			if err := change(filepath.Dir(s.one("1/layer/layer.tar"))); err != nil {
				t.Fatal(err)
			}
			if _, err := s.read(name); !errdefs.IsDataLoss(err) {
				t.Errorf("a view of it: %v", err)
			}
			if err := s.Mount(t.Context(), "before", t.TempDir()); !errdefs.IsDataLoss(err) {
				t.Errorf("mount a snapshot prepared before: %v", err)
			}
		})
	}
}

func edit(name string, f func([]byte) []byte) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	return os.WriteFile(name, f(b), 0o400)
}

// A store that other users can write to is refused, since they could change a mounted image.
func TestDirectoryOfOthers(t *testing.T) {
	need(t)
	s := newStore(t, t.TempDir())
	name := s.stack(map[string]string{"a": "1"})
	for what, change := range map[string]func() error{
		"its owner":        func() error { return os.Chown(s.dir, 12345, 0) },
		"open to everyone": func() error { return os.Chmod(s.dir, 0o777) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.read(name); !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", what, err)
		}
		if err := errors.Join(os.Chown(s.dir, 0, 0), os.Chmod(s.dir, 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	s.expect(name, "a=1")
}

// Files on tmpfs can't be mounted directly. They become loop devices, which disappear with the mount.
func TestLoopDevices(t *testing.T) {
	need(t)
	root := filepath.Join(t.TempDir(), "tmpfs")
	if err := errors.Join(os.Mkdir(root, 0o755), unix.Mount("tmpfs", root, "tmpfs", 0, "size=16m")); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	}()
	snapshottest.Require(t, "loop", erofs.Driver{}.Check(t.Context(), root))
	s := newStore(t, root)
	name := s.stack(map[string]string{"a": strings.Repeat("1", 3000)}, map[string]string{"b": "2"})
	s.expect(name, "a="+strings.Repeat("1", 3000)+" b=2")
	clear(s.Snapshotter)
}

// If the disk is full during a commit, the snapshot stays active and unchanged.
func TestFullDisk(t *testing.T) {
	need(t)
	root := filepath.Join(t.TempDir(), "tmpfs")
	if err := errors.Join(os.Mkdir(root, 0o755), unix.Mount("tmpfs", root, "tmpfs", 0, "size=4m")); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	}()
	snapshottest.Require(t, "loop", erofs.Driver{}.Check(t.Context(), root))
	ctx := t.Context()
	s := newStore(t, root)
	m, err := s.Prepare(ctx, "key", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(m[0].Source, "big")
	if err := os.WriteFile(big, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, "name", "key", snapshot.CommitOptions{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("commit on a full disk: %v", err)
	}
	if err := os.Truncate(big, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, "name", "key", snapshot.CommitOptions{}); err != nil {
		t.Fatalf("commit with room: %v", err)
	}
	s.expect("name", "big="+string(make([]byte, 1<<20)))
	if err := s.Remove(ctx, "name"); err != nil {
		t.Error(err)
	}
}

// A chain may have as many layers as with overlayfs. One image shows them all.
func TestManyLayers(t *testing.T) {
	need(t)
	s := newStore(t, t.TempDir())
	layers := make([]map[string]string, 500)
	for i := range layers {
		layers[i] = map[string]string{fmt.Sprintf("f%03d", i): "x", "all": fmt.Sprint(i)}
	}
	name := s.stack(layers...)
	got, err := s.read(name)
	if files := strings.Fields(got); err != nil || len(files) != 501 || files[0] != "all=499" {
		t.Errorf("%d files, %.20q: %v", len(files), got, err)
	}
	if _, err := s.Prepare(t.Context(), "key", name, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "more", "key", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "key", "more", nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("501 layers: %v", err)
	}
}

// With a user namespace, the files from archives have mapped owners too.
func TestMapsOwners(t *testing.T) {
	need(t)
	c := exec.Command("sleep", "1000")
	maps := []syscall.SysProcIDMap{{HostID: 700000, Size: 1000}}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: maps, GidMappings: maps}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", c.Process.Pid))
	_ = c.Process.Kill()
	_ = c.Wait()
	if err != nil {
		t.Fatal(err)
	}
	defer users.Close()
	t.Run("", func(t *testing.T) { mapsOwners(t, users) })
	defer erofs.RefuseDetached()()
	t.Run("before Linux 6.15", func(t *testing.T) { mapsOwners(t, users) })
}

func mapsOwners(t *testing.T, users *os.File) {
	s := newStore(t, t.TempDir())
	name := s.stack(map[string]string{"a": "1"}, map[string]string{"b": "2"})
	if _, err := s.Prepare(t.Context(), "key", name, nil); err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	if err := s.MountWith(t.Context(), "key", mnt, snapshot.MountOptions{Users: users}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := snapshot.Unmount(mnt); err != nil {
			t.Error(err)
		}
	}()
	for _, file := range []string{".", "a", "b"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(mnt, file), &st); err != nil || st.Uid != 700000 || st.Gid != 700000 {
			t.Errorf("%s is owned by %d:%d: %v", file, st.Uid, st.Gid, err)
		}
	}
}

// A snapshot is compared with its parent's image, which excludes its own changes.
func TestCompare(t *testing.T) {
	need(t)
	s, mnt := newStore(t, t.TempDir()), t.TempDir()
	name := s.stack(map[string]string{"a": "1"})
	if _, err := s.Prepare(t.Context(), "key", name, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Mount(t.Context(), "key", mnt); err != nil {
		t.Fatal(err)
	}
	err := os.WriteFile(filepath.Join(mnt, "new"), nil, 0o600)
	if err := errors.Join(err, snapshot.Unmount(mnt)); err != nil {
		t.Fatal(err)
	}
	c, err := s.Compare(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if names, err := c.LowerNames("."); err != nil || !slices.Equal(names, []string{"a"}) {
		t.Errorf("its parent has %q: %v", names, err)
	}
}

// Mounts that a killed driver has left do not keep a snapshot from being used and removed.
func TestBrieflyMounted(t *testing.T) {
	need(t)
	s := newStore(t, t.TempDir())
	name := s.stack(map[string]string{"a": "1"})
	if _, err := s.Prepare(t.Context(), "key", name, nil); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(s.dir, "2", snapshot.BrieflyMounted+"1")
	if err := errors.Join(os.Mkdir(left, 0o700), unix.Mount("tmpfs", left, "tmpfs", 0, "size=1m")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(left, unix.MNT_DETACH) })
	if err := s.Remove(t.Context(), "key"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(b, []byte(snapshot.BrieflyMounted+"1 ")) {
		t.Errorf("it is still mounted: %v", err)
	}
}

// A stack of invalid layers, or of layers that together are invalid, leaves no snapshots: an existing snapshot would
// never be made again.
func TestStackOfBadLayers(t *testing.T) {
	need(t)
	store := func(h tar.Header) func(dir string) error {
		return func(dir string) error {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			if err := errors.Join(w.WriteHeader(&h), w.Close()); err != nil {
				return err
			}
			_, err := image.Store(t.Context(), dir, &b, image.StoreOptions{})
			return err
		}
	}
	s := newStore(t, t.TempDir())
	s.stack(map[string]string{"a": "1"})
	for what, bad := range map[string]struct {
		make func(dir string) error
		is   func(error) bool
	}{
		"files of a layer":       {func(dir string) error { return os.WriteFile(dir+"/file", nil, 0o600) }, errdefs.IsDataLoss},
		"a hard link to nothing": {store(tar.Header{Typeflag: tar.TypeLink, Name: "x", Linkname: "none"}), errdefs.IsInvalidArgument},
		"a device that can't be": {store(tar.Header{Typeflag: tar.TypeChar, Name: "x", Devmajor: 1 << 13}), errdefs.IsInvalidArgument},
	} {
		apply := func(f func(dir string) error) func(context.Context, snapshot.Place) error {
			return func(_ context.Context, p snapshot.Place) error { return errors.Join(os.Mkdir(p.Dir, 0o700), f(p.Dir)) }
		}
		good := store(tar.Header{Name: "good", Mode: 0o600})
		list := []snapshot.Layer{{Name: "low", Apply: apply(good)}, {Name: "bad", Apply: apply(bad.make)}, {Name: "high", Apply: apply(good)}}
		if err := s.Stack(t.Context(), "layer 1", list, 8, func(string) error { return nil }); !bad.is(err) {
			t.Errorf("%s: %v", what, err)
		}
		for _, name := range []string{"bad", "high"} {
			if _, err := s.Stat(t.Context(), name); !errdefs.IsNotFound(err) {
				t.Errorf("%s: the layer %s exists: %v", what, name, err)
			}
		}
		s.expect("layer 1", "a=1")
	}
}

// When an image is replaced, the seal of the old one is removed.
func TestSealOfAnOldImage(t *testing.T) {
	need(t)
	s := newStore(t, t.TempDir())
	name := s.stack(map[string]string{"a": "1"})
	f, err := os.Open(s.one("*/image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() // keep its inode number from being reused until then
	var st unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &st), image.Seal(f, "other layers")); err != nil {
		t.Fatal(err)
	}
	s.expect(name, "a=1")
	seal := fmt.Sprintf("/run/distkit/erofs/%x:%x", st.Dev, st.Ino)
	if _, err := os.Stat(seal); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", seal, err)
	}
}
