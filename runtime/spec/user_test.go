package spec

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const passwd = `# comment
root:x:0:0:root:/root:/bin/sh

broken
wide:x:4294967295:1:no such ID:/wide:/bin/sh
alice:x:1000:100:A:/home/alice:/bin/sh
1000:x:7:7:a number as name:/seven:
relative:x:1001:1001::home:/bin/sh
alice:x:5:5:second of a name:/:
nohome:x:1002:1002
`

const group = `root:x:0:
wheel:x:10:root,alice
users:x:100:alice
audio:x:29:bob,alice,bob
audio2:x:29:alice
bad:x:nan:alice
short
`

func TestUser(t *testing.T) {
	root := t.TempDir()
	testenv.Write(t, filepath.Join(root, "etc/passwd"), passwd)
	testenv.Write(t, filepath.Join(root, "etc/group"), group)
	for _, c := range []struct {
		user     string
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		{"", 0, 0, []uint32{0, 10}, "/root"},
		{"0", 0, 0, []uint32{0, 10}, "/root"},
		{"alice", 1000, 100, []uint32{100, 10, 29}, "/home/alice"},
		{"1000", 1000, 100, []uint32{100, 10, 29}, "/home/alice"}, // a number is never looked up as a name
		{"alice:audio", 1000, 29, []uint32{29}, "/home/alice"},
		{"alice:12345", 1000, 12345, []uint32{12345}, "/home/alice"},
		{"alice:", 1000, 100, []uint32{100, 10, 29}, "/home/alice"},
		{":audio", 0, 29, []uint32{29}, "/root"},
		{"4000", 4000, 0, []uint32{0}, "/"},
		{"4000:4001", 4000, 4001, []uint32{4001}, "/"},
		{"relative", 1001, 1001, []uint32{1001}, "/"},
	} {
		u, home, err := User(root, c.user)
		if err != nil {
			t.Errorf("%q: %v", c.user, err)
			continue
		}
		if u.UID != c.uid || u.GID != c.gid || !slices.Equal(u.AdditionalGids, c.groups) || home != c.home {
			t.Errorf("%q: %d:%d %v %s, not %+v", c.user, u.UID, u.GID, u.AdditionalGids, home, c)
		}
	}
	for user, is := range map[string]func(error) bool{
		"bob": errdefs.IsNotFound, "alice:nope": errdefs.IsNotFound, "nohome": errdefs.IsNotFound, "wide": errdefs.IsNotFound,
		"4294967295": errdefs.IsInvalidArgument, "0:99999999999": errdefs.IsInvalidArgument, "a\x00b": errdefs.IsInvalidArgument,
		"-1": errdefs.IsNotFound,
	} {
		if _, _, err := User(root, user); !is(err) {
			t.Errorf("%q: %v", user, err)
		}
	}
}

// Images from scratch have no etc/passwd, but some have USER root nevertheless.
func TestUserRoot(t *testing.T) {
	empty, other, group := t.TempDir(), t.TempDir(), t.TempDir()
	testenv.Write(t, filepath.Join(other, "etc/passwd"), "toor:x:0:5::/toor:\nroot:x:7:8::/seven:\n")
	testenv.Write(t, filepath.Join(group, "etc/passwd"), "root:x:0:0::/root:\nann:x:9:9::/ann:\n")
	if err := os.Symlink("group", filepath.Join(group, "etc/group")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		root, user string
		uid, gid   uint32
		home       string
	}{
		{empty, "root", 0, 0, "/"}, {empty, "root:root", 0, 0, "/"}, {empty, "0:root", 0, 0, "/"}, {empty, "root:0", 0, 0, "/"},
		{empty, "root:5", 0, 5, "/"}, {empty, "5:root", 5, 0, "/"}, {"", "root", 0, 0, ""}, {"", "root:root", 0, 0, ""},
		{other, "root", 7, 8, "/seven"}, {group, "root", 0, 0, "/root"}, {group, "root:root", 0, 0, "/root"}, {group, "9", 9, 9, "/ann"},
	} {
		u, home, err := User(c.root, c.user)
		if err != nil || u.UID != c.uid || u.GID != c.gid || home != c.home {
			t.Errorf("%+v: %+v %s %v", c, u, home, err)
		}
	}
}

func TestUserWithoutRootfs(t *testing.T) {
	if u, home, err := User("", "3:4"); err != nil || u.UID != 3 || u.GID != 4 || home != "" {
		t.Errorf("3:4: %+v %q %v", u, home, err)
	}
	for _, user := range []string{"alice", "3:audio", ":audio"} {
		if _, _, err := User("", user); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--rootfs") {
			t.Errorf("%s: %v", user, err)
		}
	}
}

// The rootfs is hostile. Nothing in it may lead the look-up outside, block it, or use much memory.
func TestUserStaysInRootfs(t *testing.T) {
	outside := t.TempDir()
	testenv.Write(t, filepath.Join(outside, "etc/passwd"), "victim:x:1:1::/outside:\n")
	for name, make := range map[string]func(t *testing.T, root string) error{
		"absolute link": func(_ *testing.T, root string) error {
			return os.Symlink(filepath.Join(outside, "etc/passwd"), filepath.Join(root, "etc/passwd"))
		},
		"relative link": func(_ *testing.T, root string) error {
			up := strings.Repeat("../", 40)
			return os.Symlink(up+outside+"/etc/passwd", filepath.Join(root, "etc/passwd"))
		},
		"linked directory": func(_ *testing.T, root string) error {
			if err := os.Remove(filepath.Join(root, "etc")); err != nil {
				return err
			}
			return os.Symlink(filepath.Join(outside, "etc"), filepath.Join(root, "etc"))
		},
		"loop": func(_ *testing.T, root string) error {
			return os.Symlink("passwd", filepath.Join(root, "etc/passwd"))
		},
		"fifo": func(_ *testing.T, root string) error {
			return unix.Mkfifo(filepath.Join(root, "etc/passwd"), 0o644)
		},
		"directory": func(_ *testing.T, root string) error {
			return os.Mkdir(filepath.Join(root, "etc/passwd"), 0o755)
		},
		"huge": func(_ *testing.T, root string) error {
			f, err := os.Create(filepath.Join(root, "etc/passwd"))
			if err != nil {
				return err
			}
			defer f.Close()
			return f.Truncate(1 << 40)
		},
		"long line": func(t *testing.T, root string) error {
			testenv.Write(t, filepath.Join(root, "etc/passwd"), strings.Repeat("x", maxUserLine+1)+"\nvictim:x:1:1::/:\n")
			return nil
		},
		"magic link": func(_ *testing.T, root string) error {
			return os.Symlink("/proc/self/root"+outside+"/etc/passwd", filepath.Join(root, "etc/passwd"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := make(t, root); err != nil {
				t.Fatal(err)
			}
			if u, home, err := User(root, "victim"); err == nil {
				t.Errorf("found %+v %s", u, home)
			}
			// A user that needs no look-up is accepted whatever the files are.
			for user, want := range map[string]uint32{"": 0, "0": 0, "root": 0, "root:root": 0, "1000:1001": 1000, "65532": 65532} {
				if u, home, err := User(root, user); err != nil || u.UID != want || home != "/" {
					t.Errorf("%q: %+v %s %v", user, u, home, err)
				}
			}
			if _, _, err := User(root, "0:victims"); err == nil {
				t.Error("found an unknown group")
			}
		})
	}
}

func TestUserFollowsLinksInside(t *testing.T) {
	root := t.TempDir()
	testenv.Write(t, filepath.Join(root, "real/passwd"), "inside:x:9:9::/in:\n")
	if err := os.Symlink("/real", filepath.Join(root, "etc")); err != nil {
		t.Fatal(err)
	}
	if u, _, err := User(root, "inside"); err != nil || u.UID != 9 {
		t.Errorf("%+v %v", u, err)
	}
}

func TestUserInTooManyGroups(t *testing.T) {
	root := t.TempDir()
	testenv.Write(t, filepath.Join(root, "etc/passwd"), "a:x:1:1::/:\n")
	var b strings.Builder
	for i := range 2000 {
		b.WriteString("g:x:" + strconv.Itoa(i+2) + ":a\n")
	}
	testenv.Write(t, filepath.Join(root, "etc/group"), b.String())
	if u, _, err := User(root, "a"); err != nil || len(u.AdditionalGids) != 2001 {
		t.Errorf("%d groups, %v", len(u.AdditionalGids), err)
	}
}

func FuzzUser(f *testing.F) {
	f.Add("alice:audio", passwd, group)
	f.Add("0", "root::0:0::\x00:", "")
	f.Fuzz(func(t *testing.T, user, passwd, group string) {
		root := t.TempDir()
		testenv.Write(t, filepath.Join(root, "etc/passwd"), passwd)
		testenv.Write(t, filepath.Join(root, "etc/group"), group)
		u, home, err := User(root, user)
		if err != nil {
			return
		}
		if !filepath.IsAbs(home) || strings.ContainsRune(home, 0) || u.UID == 1<<32-1 || u.GID == 1<<32-1 || len(u.AdditionalGids) == 0 {
			t.Errorf("%q: %+v %q", user, u, home)
		}
	})
}
