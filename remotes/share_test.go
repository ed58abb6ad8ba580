package remotes

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func runtimeDir(t *testing.T) string {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	return filepath.Join(dir, "distkit")
}

// Ten processes request one token, and one of them requests a new one if it is refused. Locks of open files exclude
// each other within one process, too, so the test uses one.
func TestSharedToken(t *testing.T) {
	shared := runtimeDir(t)
	k := newTokens(t)
	k.user = "me:word"
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	var wg sync.WaitGroup
	for range 10 {
		r := open(t, k.host(), Options{})
		wg.Go(func() {
			if _, err := fetch(t, r, "latest"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(k.asked) != 1 {
		t.Errorf("%d tokens were asked for", len(k.asked))
	}
	// A process that comes later uses the token in its first request.
	k.reset()
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil || k.count() != 1 {
		t.Errorf("%d requests, %v", k.count(), err)
	}
	files, _ := filepath.Glob(filepath.Join(shared, "*"))
	if len(files) != 1 {
		t.Fatalf("files: %q", files)
	}
	for _, name := range files {
		info, _ := os.Stat(name)
		b, _ := os.ReadFile(name)
		if info.Mode().Perm() != 0o600 || strings.Contains(string(b), "word") || !strings.Contains(string(b), "secret-token") {
			t.Errorf("%s %v: %s", name, info.Mode(), b)
		}
		// Another token in the file, which the registry refuses.
		os.WriteFile(name, fmt.Appendf(nil, `{"token":"stale","expires":%q}`, time.Now().Add(time.Hour).Format(time.RFC3339)), 0o600)
	}
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil || len(k.asked) != 2 {
		t.Errorf("after a refusal: %d tokens, %v", len(k.asked), err)
	}
	// Incomplete and outdated files are ignored.
	for _, content := range []string{"", "{", `{"token":"old","expires":"2006-01-02T15:04:05Z"}`} {
		before := len(k.asked)
		os.WriteFile(files[0], []byte(content), 0o600)
		if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil || len(k.asked) != before+1 {
			t.Errorf("%q: %d tokens, %v", content, len(k.asked)-before, err)
		}
	}
	// Another login has its own tokens.
	before := len(k.asked)
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:other")+`"}}}`)
	_, err := fetch(t, open(t, k.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if len(k.asked) == before {
		t.Error("the token of another login was used")
	}
}

func TestSharedDirNotTrusted(t *testing.T) {
	dir := runtimeDir(t)
	if got := sharedDir(); got != dir {
		t.Fatalf("got %q", got)
	}
	os.Chmod(dir, 0o755)
	if got := sharedDir(); got != "" {
		t.Error("a directory that others can read is trusted")
	}
	os.Remove(dir)
	os.Symlink(t.TempDir(), dir)
	if got := sharedDir(); got != "" {
		t.Error("a link is trusted")
	}
	t.Setenv("XDG_RUNTIME_DIR", "relative")
	if got := sharedDir(); got != "" {
		t.Error("a relative directory is taken")
	}
}

// Without a runtime directory other directories are used. One that others could change is not.
func TestSharedDirWithoutRuntime(t *testing.T) {
	temp, uid := t.TempDir(), strconv.Itoa(os.Geteuid())
	t.Setenv("TMPDIR", temp)
	t.Setenv("XDG_RUNTIME_DIR", "")
	old := sharedPlaces
	defer func() { sharedPlaces = old }()
	// The last candidate is below TMPDIR, whatever candidates this machine has before it.
	mine := filepath.Join(temp, "distkit-"+uid)
	all := realPlaces()
	if all[len(all)-1] != mine || all[0] != "/run/user/"+uid+"/distkit" || slices.Contains(all, "/run/distkit") != (uid == "0") {
		t.Errorf("places: %q", all)
	}
	t.Setenv("XDG_RUNTIME_DIR", "/first")
	if got := realPlaces()[0]; got != "/first/distkit" {
		t.Errorf("the first place is %q", got)
	}
	sharedPlaces = func() []string { return []string{filepath.Join(temp, "none", "distkit"), mine} }
	if got := sharedDir(); got != mine {
		t.Fatalf("%q is taken", got)
	}
	if info, err := os.Stat(mine); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	for mode, taken := range map[os.FileMode]bool{0o777: false, 0o777 | os.ModeSticky: true, 0o775: false, 0o755: true} {
		if err := os.Chmod(temp, mode); err != nil {
			t.Fatal(err)
		}
		if got := sharedDir(); (got == mine) != taken {
			t.Errorf("below %v: %q", mode, got)
		}
	}
	os.Chmod(temp, 0o700)
	if os.Geteuid() == 0 {
		// The runtime directory of another user, as with sudo -E, and a directory that another user made for this one.
		for _, dir := range []string{temp, mine} {
			if err := os.Lchown(dir, 12345, 12345); err != nil {
				t.Fatal(err)
			}
			if got := sharedDir(); got != "" {
				t.Errorf("%s of another user is taken", dir)
			}
			os.Lchown(dir, 0, 0)
		}
	}
	// A file that others could have written or could read is ignored.
	for _, plant := range []func(name string) error{
		func(name string) error { return os.WriteFile(name, nil, 0o644) },
		func(name string) error { return os.Symlink("/dev/null", name) },
		func(name string) error { return unix.Mkfifo(name, 0o600) },
		func(name string) error { return os.Mkdir(name, 0o700) },
	} {
		f, err := sharedFile(mine, "token", os.O_RDWR|os.O_CREATE, "x")
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		os.Remove(f.Name())
		if err := plant(f.Name()); err != nil {
			t.Fatal(err)
		}
		if f, err := sharedFile(mine, "token", os.O_RDWR|os.O_CREATE, "x"); err == nil {
			info, _ := f.Stat()
			t.Errorf("%v is taken", info.Mode())
		}
		os.RemoveAll(f.Name())
	}

	// When a file is added, old files are removed, but not those of others.
	past := time.Now().Add(-2 * staleToken)
	for name, age := range map[string]time.Time{"token-old": past, "wait-old": past, "upload-young": past, "upload-old": time.Now().Add(-2 * staleUpload),
		"token-new": time.Now(), "run": past, "lock-x": past} {
		file := filepath.Join(mine, name)
		if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, age, age); err != nil {
			t.Fatal(err)
		}
	}
	k := newTokens(t)
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil {
		t.Fatal(err)
	}
	var left []string
	files, _ := os.ReadDir(mine)
	for _, f := range files {
		if len(f.Name()) < 20 {
			left = append(left, f.Name())
		}
	}
	if want := []string{"lock-x", "run", "token-new", "upload-young"}; !slices.Equal(left, want) || len(files) != len(want)+1 {
		t.Errorf("left: %q of %d", left, len(files))
	}
}

// When a registry asks one process to wait, the others wait, too.
func TestSharedWait(t *testing.T) {
	runtimeDir(t)
	f := newFake(t)
	id := f.blob(noise(10))
	start := time.Now()
	after := "1"
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n == 1 {
			w.Header().Set("Retry-After", after)
			w.WriteHeader(http.StatusTooManyRequests)
		} else if after == "1" && time.Since(start) < 900*time.Millisecond {
			t.Error("asked too early")
		}
		return n == 1
	})
	first := make(chan error)
	r := open(t, f.host(), Options{Notify: func(string) { first <- nil }})
	go func() {
		_, err := fetch(t, r, id)
		first <- err
	}()
	<-first
	var told []string
	if _, err := fetch(t, open(t, f.host(), Options{Notify: func(s string) { told = append(told, s) }}), id); err != nil {
		t.Error(err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	// A wait that is too long fails here as it did in the other process.
	f.reset()
	after = "3600"
	for range 2 {
		_, err := fetch(t, open(t, f.host(), Options{}), id)
		is(t, err, errdefs.IsResourceExhausted)
	}
	if f.count() != 1 {
		t.Errorf("%d requests", f.count())
	}
}

// A mirror that asks to wait is skipped, like one that is down.
func TestSharedWaitOfMirror(t *testing.T) {
	runtimeDir(t)
	mirror, upstream := newFake(t), newFake(t)
	id := upstream.blob(noise(10))
	mirror.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	})
	root := t.TempDir()
	writeHosts(t, root, "good.example", "server = '"+upstream.URL+"'\n[host.'"+mirror.URL+"']\n")
	for range 3 {
		if _, err := fetch(t, open(t, "good.example", Options{HostsDir: root}), id); err != nil {
			t.Fatal(err)
		}
	}
	if mirror.count() != 1 || upstream.count() != 3 {
		t.Errorf("mirror %q, upstream %q", mirror.seen(), upstream.seen())
	}
}

func TestExpiry(t *testing.T) {
	if d := time.Until(expiry("e30.eyJleHAiOjQxMDI0NDQ4MDB9.x")); d < 1000*time.Hour {
		t.Errorf("a JWT of 2100 expires in %v", d)
	}
	for _, s := range []string{"", "opaque", "a.b.c", "e30.e30.x"} {
		if d := time.Until(expiry(s)); d > tokenLife || d < tokenLife-time.Minute/10 {
			t.Errorf("%q expires in %v", s, d)
		}
	}
}
