package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"distkit/disk/sys"
)

// Headers that tar.Writer does not write. Each is refused or harmless, and no result is larger than the bytes of the
// layer.
func TestHostileHeaders(t *testing.T) {
	end := make([]byte, 2*blockSize)
	field := func(at int, value string) []byte {
		b := block(nil, '0', "f", "body")
		copy(b[at:], value)
		checksum(b[:blockSize])
		return b
	}
	pax := func(records string) []byte { return block(block(nil, 'x', "pax", records), '0', "f", "body") }
	for name, test := range map[string]struct {
		data []byte
		err  error // or nil
		left []string
	}{
		"size beyond the end":    {field(124, "00000100000"), errdefs.ErrDataLoss, []string{"f"}},
		"size of 8 GiB":          {field(124, "77777777777"), errdefs.ErrDataLoss, []string{"f"}},
		"negative size":          {field(124, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), errdefs.ErrDataLoss, nil},
		"size of 2^63":           {field(124, "\x80\x00\x00\x00\x80\x00\x00\x00\x00\x00\x00\x00"), errdefs.ErrDataLoss, nil},
		"size that is no number": {field(124, "zzzzzzzzzzz"), errdefs.ErrDataLoss, nil},
		"wrong checksum":         {append([]byte("x"), block(nil, '0', "f", "body")[1:]...), errdefs.ErrDataLoss, nil},
		"NUL in a name":          {field(1, "\x00hidden"), nil, []string{"f"}},
		"NUL in a PAX name":      {pax(record("path", "a\x00b")), errdefs.ErrDataLoss, nil},
		"NUL in a PAX link":      {pax(record("linkpath", "a\x00b")), errdefs.ErrDataLoss, nil},
		"NUL in an attribute":    {pax(record("SCHILY.xattr.user.a\x00b", "1")), errdefs.ErrDataLoss, nil},
		"empty PAX name":         {pax(record("path", "")), nil, []string{"f"}},
		"PAX size that lies":     {pax(record("size", "1000000")), errdefs.ErrDataLoss, []string{"f"}},
		"PAX size below 0":       {pax(record("size", "-1")), errdefs.ErrDataLoss, nil},
		"PAX record that lies":   {pax("99 path=x\n"), errdefs.ErrDataLoss, nil},
		"PAX without newline":    {pax("8 a=bcde"), errdefs.ErrDataLoss, nil},
		"PAX bomb":               {block(block(nil, 'x', "pax", record("comment", strings.Repeat("x", 2<<20))), '0', "f", ""), errdefs.ErrDataLoss, nil},
		"many PAX headers":       {append(bytes.Repeat(block(nil, 'x', "pax", record("comment", "x")), 5000), block(nil, '0', "f", "")...), nil, []string{"f"}},
		"long name bomb":         {block(block(nil, 'L', "long", strings.Repeat("x", 2<<20)), '0', "f", ""), errdefs.ErrDataLoss, nil},
		"long name of 64 KiB":    {block(block(nil, 'L', "long", strings.Repeat("x", 64<<10)), '0', "f", ""), errdefs.ErrInvalidArgument, nil},
		"long link of 64 KiB":    {block(block(nil, 'K', "long", strings.Repeat("x", 64<<10)), '1', "f", ""), errdefs.ErrInvalidArgument, nil},
		"owner below 0":          {pax(record("uid", "-1")), errdefs.ErrInvalidArgument, nil},
		"body of a directory":    {block(block(nil, '5', "d", "body"), '0', "f", "x"), errdefs.ErrDataLoss, []string{"d"}},
		"body of a link":         {block(block(nil, '0', "f", "x"), '1', "f2", "body"), errdefs.ErrInvalidArgument, []string{"f"}},
		"sparse map backwards": {pax(record("GNU.sparse.major", "0") + record("GNU.sparse.minor", "1") + record("GNU.sparse.map", "9,1,0,1") + record("GNU.sparse.size", "10")),
			errdefs.ErrDataLoss, nil},
		"sparse map beyond size": {pax(record("GNU.sparse.major", "0") + record("GNU.sparse.minor", "1") + record("GNU.sparse.map", "0,4") + record("GNU.sparse.size", "2")),
			errdefs.ErrDataLoss, nil},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJail(t)
			before, fds := j.around(t), openFDs(t)
			_, err := apply(t, j.root, append(test.data, end...), Options{})
			if !errors.Is(err, test.err) {
				t.Errorf("error is %v, not %v", err, test.err)
			}
			if got := names(t, j.root); strings.Join(got, " ") != strings.Join(test.left, " ") {
				t.Errorf("left %q, not %q", got, test.left)
			}
			if n := openFDs(t); n != fds {
				t.Errorf("%d descriptors are open, not %d", n, fds)
			}
			equal(t, j.around(t), before)
		})
	}
}

// Reading a quarter of a million entries takes as much memory as a small layer does. (make bench-apply shows a
// million.)
func TestBombsNeedNoMemory(t *testing.T) {
	const entries = 250_000
	bomb := func(write func(w *tar.Writer)) io.Reader {
		r, p := io.Pipe()
		go func() {
			z, _ := gzip.NewWriterLevel(p, gzip.BestSpeed)
			w := tar.NewWriter(z)
			write(w)
			_ = w.Close()
			_ = z.Close()
			_ = p.Close()
		}()
		return r
	}
	for name, write := range map[string]func(w *tar.Writer){
		"entries": func(w *tar.Writer) {
			for i := range entries {
				_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i%1000), Mode: 0o755})
			}
		},
		"whiteouts": func(w *tar.Writer) {
			for i := range entries {
				_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf(".wh.f%d", i)})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() {
				t.Skip("short")
			}
			root := t.TempDir()
			if err := os.WriteFile(filepath.Join(root, "lower"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			r, err := Apply(t.Context(), root, bomb(write), Options{})
			if err != nil || r.Entries != entries {
				t.Fatalf("%d entries: %v", r.Entries, err)
			}
			runtime.ReadMemStats(&after)
			if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 32<<20 {
				t.Errorf("the heap has grown by %d MiB", grown>>20)
			}
		})
	}
}

// All breakouts are tried again without openat2, in a process that has a filter which makes it fail, as on an old
// kernel or with a filter of system calls that does not know it.
func TestWithoutOpenat2(t *testing.T) {
	const env = "TEST_WITHOUT_OPENAT2"
	errno := map[string]unix.Errno{"ENOSYS": unix.ENOSYS, "EPERM": unix.EPERM}
	if e, ok := errno[os.Getenv(env)]; ok {
		forbidOpenat2(t, e)
		if _, err := unix.Openat2(unix.AT_FDCWD, ".", &unix.OpenHow{Flags: unix.O_RDONLY}); !errors.Is(err, e) {
			t.Fatalf("openat2 gives %v", err)
		}
		root := t.TempDir()
		sys.NoOpenat2.Store(false)
		mustApply(t, root, layerOf(t, fileEntry("a/b/c/d", "1"), symlink("l", "/a/b"), fileEntry("l/c/e", "2"), symlink("out", "/etc"), fileEntry("out/distkit", "3")), Options{})
		if !sys.NoOpenat2.Load() {
			t.Error("openat2 was not missed")
		}
		if got := strings.Join(names(t, root), " "); got != "a a/b a/b/c a/b/c/d a/b/c/e etc etc/distkit l out" {
			t.Error(got)
		}
		return
	}
	for name := range errno {
		c := exec.Command(os.Args[0], "-test.run=^TestWithoutOpenat2$")
		c.Env = append(os.Environ(), env+"="+name)
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// forbidOpenat2 makes the call fail in all threads of the process.
func forbidOpenat2(t *testing.T, errno unix.Errno) {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT2, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); e != 0 {
		t.Fatalf("seccomp: %v", e)
	}
}
