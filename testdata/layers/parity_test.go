// Package layers compares the result of applying layers with distkit with those of other programs.
package layers

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/pkg/archive"
	moby "github.com/moby/go-archive"
	"golang.org/x/sys/unix"

	"distkit/archive"

	"layers/peer"
)

var sets = flag.String("sets", "", "the sets of debian.sh to compare too, with commas between them")

const readme = "README.md"

var then = time.Date(2017, 2, 3, 4, 5, 6, 0, time.UTC)

// require skips a test if the machine lacks something. If TEST_REQUIRE lists it, the test fails instead.
func require(t *testing.T) {
	t.Helper()
	for need, ok := range map[string]bool{"root": os.Geteuid() == 0, "umoci": has("umoci")} {
		if !ok {
			skip(t, need)
		}
	}
}

// skip skips a test that needs something this machine lacks. If TEST_REQUIRE lists it, the test fails instead.
func skip(t *testing.T, need string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("TEST_REQUIRE"), ","), need) {
		t.Fatalf("%s is required and not here", need)
	}
	t.Skipf("wants %s", need)
}

func has(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

// peers apply layers in order to a directory. The layers are compressed with gzip.
var peers = map[string]func(t *testing.T, root string, layers []string) error{
	"distkit": func(_ *testing.T, root string, layers []string) error {
		return each(layers, func(r io.Reader) error {
			_, err := archive.Apply(context.Background(), root, r, archive.Options{})
			return err
		})
	},
	"distkit with one worker": func(_ *testing.T, root string, layers []string) error {
		return each(layers, func(r io.Reader) error {
			_, err := archive.Apply(context.Background(), root, r, archive.Options{Workers: 1})
			return err
		})
	},
	"containerd": func(_ *testing.T, root string, layers []string) error {
		return each(layers, func(r io.Reader) error {
			z, err := gzip.NewReader(r)
			if err == nil {
				_, err = containerd.Apply(context.Background(), root, z)
			}
			return err
		})
	},
	"go-archive": func(_ *testing.T, root string, layers []string) error {
		return each(layers, func(r io.Reader) error {
			_, err := moby.ApplyLayer(root, r)
			return err
		})
	},
	"umoci": func(t *testing.T, root string, layers []string) error {
		image := filepath.Join(t.TempDir(), "image")
		if err := peer.Image(image, layers...); err != nil {
			return err
		}
		if err := os.Remove(root); err != nil {
			return err
		}
		out, err := exec.Command("umoci", "raw", "unpack", "--image", image+":layer", root).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	},
	"tar": func(_ *testing.T, root string, layers []string) error {
		return each(layers, func(r io.Reader) error {
			c := exec.Command("tar", "-xpzf", "-", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", root)
			c.Stdin = r
			out, err := c.CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	},
}

func each(layers []string, apply func(io.Reader) error) error {
	for _, l := range layers {
		f, err := os.Open(l)
		if err != nil {
			return err
		}
		err = apply(f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// result is the result of a peer: one line per file, or one that says that the peer refused the layers.
func result(t *testing.T, name string, layers []string) []string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := peers[name](t, root, layers); err != nil {
		t.Logf("%s: %v", name, err)
		return []string{"refused"}
	}
	return dump(t, root)
}

// recent matches the times of directories without an entry.
var recent = regexp.MustCompile(`@1[7-9]\d{8}\.\d{9}|@[2-9]\d{9}\.\d{9}`)

func dump(t *testing.T, dir string) []string {
	t.Helper()
	inodes := map[uint64]string{}
	var lines []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		line := recent.ReplaceAllString(fmt.Sprintf("%s %o %d:%d @%d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec), "@now")
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %.8x", st.Size, h.Sum(nil))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d", st.Rdev)
		}
		if first, ok := inodes[st.Ino]; ok {
			line += " = " + first
		} else if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[st.Ino] = rel
		}
		buf := make([]byte, 4096)
		n, _ := unix.Llistxattr(p, buf)
		for _, name := range slices.Sorted(strings.SplitSeq(string(buf[:max(n, 0)]), "\x00")) {
			if name != "" && name != "security.selinux" {
				value := make([]byte, 4096)
				n, _ := unix.Lgetxattr(p, name, value)
				line += fmt.Sprintf(" %s=%q", name, value[:max(n, 0)])
			}
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

func difference(got, want []string) string {
	var b strings.Builder
	for i, side := range [][]string{want, got} {
		other := [][]string{got, want}[i]
		have := map[string]bool{}
		for _, l := range other {
			have[l] = true
		}
		n := 0
		for _, l := range side {
			if !have[l] {
				if n++; n <= 8 {
					fmt.Fprintf(&b, "\n  %s %s", []string{"distkit", "peer   "}[i], l)
				}
			}
		}
	}
	return b.String()
}

// write writes the entries as a layer.
func write(t *testing.T, entries []entry) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, e := range entries {
		h := e.Header
		h.Size, h.Format = int64(len(e.body)), tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = then
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(t.TempDir(), "layer.tar.gz")
	if err := os.WriteFile(p, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

// If a peer's result differs from distkit's, the case states why distkit does not do the same. Otherwise both agree in
// every attribute. The page is generated from this table.
func TestParity(t *testing.T) {
	require(t)
	var table strings.Builder
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			layers := []string{write(t, c.layer)}
			if c.below != nil {
				layers = []string{write(t, c.below), layers[0]}
			}
			ours := result(t, "distkit", layers)
			for _, name := range slices.Sorted(maps.Keys(peers)) {
				if name == "distkit" || name == "tar" && c.marks() {
					continue
				}
				d := difference(result(t, name, layers), ours)
				switch why := c.differs[name]; {
				case d != "" && why == "":
					t.Errorf("%s differs:%s", name, d)
				case d == "" && why != "":
					t.Errorf("%s no longer differs", name)
				case d != "":
					fmt.Fprintf(&table, "| %s | %s | %s |\n", c.name, name, why)
				}
			}
		})
	}
	page, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(page), "|---|---|---|\n"+table.String()+"\n") {
		t.Errorf("%s does not have the table\n%s", readme, table.String())
	}
}

// Layers of real packages. All programs agree on their files.
func TestParityOfDebian(t *testing.T) {
	if *sets == "" {
		t.Log("no -sets")
		return
	}
	require(t)
	dir := t.TempDir()
	names := strings.Split(*sets, ",")
	c := exec.Command("bash", append([]string{"debian.sh", dir}, names...)...)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("debian.sh: %v: %s", err, out)
	}
	for _, set := range names {
		layers := []string{filepath.Join(dir, set+".tar.gz")}
		ours := result(t, "distkit", layers)
		if len(ours) < 500 {
			t.Errorf("%s: %d files only", set, len(ours))
		}
		for _, name := range slices.Sorted(maps.Keys(peers)) {
			if d := difference(result(t, name, layers), ours); d != "" {
				t.Errorf("%s: %s differs:%s", set, name, d)
			}
		}
	}
}
