package cmd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ownFailure lists the commands whose own failures are 125, because any other status may be that of the command they
// ran.
var ownFailure = []string{"run", "dist-run", "dist-hold", "dist-userns", "task"}

// behaviour is what this test must know about a command.
type behaviour struct {
	output []string // arguments with which it prints to stdout; nil if only --help does
	stdin  string   // standard input for output
	bad    []string // wrong arguments besides an unknown flag; nil if any arguments are accepted
	waits  []string // arguments with which it waits for stdin, or for a silent registry
}

// In the arguments, STORE is a store with a manifest BLOB named example.org/x:1, and HOST a host that accepts
// connections and never answers.
var behaviours = map[string]behaviour{
	"dist-abort":        {waits: []string{"-"}},
	"dist-active":       {bad: []string{"x", "--watch", "y"}, waits: []string{"--watch", "-"}},
	"dist-apply":        {bad: []string{}, waits: []string{"TMP/root"}},
	"dist-cat":          {output: []string{"BLOB"}, waits: []string{"-"}},
	"dist-check-remote": {bad: []string{}},
	"dist-chain":        {output: []string{"BLOB"}, waits: []string{"-"}},
	"dist-copy-graph":   {output: []string{"--from-root", "STORE", "--root", "TMP/copy", "BLOB"}, bad: []string{}, waits: []string{"--from-root", "STORE", "-"}},
	"dist-doctor":       {output: []string{}, bad: []string{"x"}},
	"distkit":           {output: []string{"help"}, bad: []string{"no-such-command"}},
	"dist-disk":         {bad: []string{"--format", "iso", "x"}},
	"dist-edit":         {bad: []string{}}, // it reports on stderr what it did not change
	"dist-diff":         {output: []string{"STORE"}, bad: []string{}},
	"dist-erofs":        {bad: []string{"--whiteouts", "keep"}, waits: []string{}},
	"dist-events":       {output: []string{}, bad: []string{"topic="}, waits: []string{"-f"}},
	"dist-export":       {output: []string{"example.org/x:1"}, bad: []string{"--platform", ""}, waits: []string{"-"}},
	"dist-gc":           {output: []string{"--grace", "0", "--dry-run", "--json"}, bad: []string{"x"}},
	"dist-hold":         {bad: []string{}, waits: []string{"--", "cat"}},
	"dist-import":       {bad: []string{"x.tar"}, waits: []string{}},
	"dist-push":         {bad: []string{}},
	"dist-put":          {output: []string{"TMP/copy", "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}, stdin: "x", bad: []string{"redis", "latest"}, waits: []string{"HOST/x", "latest"}},
	"dist-referrers":    {bad: []string{"redis"}, waits: []string{"HOST/x", "BLOB"}},
	"dist-serve":        {output: []string{"--stdio"}, stdin: "GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", bad: []string{"--tls-cert", "x"}, waits: []string{"--stdio"}},
	"dist-tags":         {output: []string{"STORE"}, bad: []string{"redis", "y"}, waits: []string{"HOST/x"}},
	"dist-login":        {bad: []string{}, waits: []string{"-u", "me", "--password-stdin", "HOST"}},
	"dist-hosts":        {output: []string{"--host", "h.example"}, stdin: "[[registry]]\nlocation = 'h.example'\n", bad: []string{}, waits: []string{"TMP/hosts"}},
	"dist-logout":       {bad: []string{}},
	"dist-token":        {bad: []string{"redis"}, waits: []string{"HOST/x"}},
	"dist-untag":        {bad: []string{"redis"}, waits: []string{"HOST/x", "latest"}},
	"dist-commit":       {bad: []string{}},
	"dist-copy":         {bad: []string{}, waits: []string{"HOST/x:1", "./x"}},
	"dist-delete":       {waits: []string{"-"}},
	"dist-fetch":        {output: []string{"STORE", "BLOB"}, bad: []string{"redis"}, waits: []string{"HOST/x", "latest"}},
	"dist-image":        {output: []string{"ls"}, bad: []string{"no-such-verb"}, waits: []string{"rm", "-"}},
	"dist-index":        {output: []string{}, stdin: oneFile, bad: []string{"--expect-diff-id", "x"}, waits: []string{}},
	"dist-ingest":       {output: []string{"ref"}, stdin: "x", bad: []string{}, waits: []string{"ref"}},
	"dist-label":        {output: []string{"BLOB", "k=v"}, bad: []string{}, waits: []string{"-"}},
	"dist-list":         {output: []string{}, bad: []string{"labels.a~="}},
	"dist-du":           {output: []string{"-"}, stdin: oneFile, bad: []string{"-", "--layers", "--ncdu"}, waits: []string{"-"}},
	"dist-file":         {bad: []string{"x"}},
	"dist-ls":           {output: []string{"-"}, stdin: oneFile, bad: []string{}, waits: []string{"-"}},
	"dist-namespace":    {output: []string{"ls"}, bad: []string{"no-such-verb"}, waits: []string{"rm", "-"}},
	"dist-path":         {output: []string{"BLOB"}, waits: []string{"-"}},
	"dist-pull":         {bad: []string{}, waits: []string{"HOST/x:latest"}},
	"dist-remote-http":  {bad: []string{}},
	"dist-remote-ssh":   {bad: []string{}},
	"dist-resolve":      {output: []string{"STORE", "example.org/x:1"}, bad: []string{"redis", "latest"}, waits: []string{"HOST/x", "latest"}},
	"dist-run":          {bad: []string{}},
	"dist-unpack":       {bad: []string{}},
	"dist-userns":       {bad: []string{}, waits: []string{"--", "cat"}},
	"dist-verify":       {waits: []string{"-"}},
	"run":               {bad: []string{}},
	"run-cdi":           {output: []string{}, stdin: `{"ociVersion":"1.0.2"}`, bad: []string{"vendor.example=x"}, waits: []string{}},
	"run-net":           {bad: []string{"no-such-verb"}, waits: []string{"del", "-"}},
	"run-spec":          {output: []string{}, stdin: `{"config":{"Cmd":["/bin/true"]}}`, bad: []string{"--memory", "much"}, waits: []string{}},
	"task":              {bad: []string{}, waits: []string{"info", "-"}},
	"snap-check-driver": {bad: []string{}},
	"snap-driver-cp":    {output: []string{"form"}, bad: []string{}},
	"snap":              {output: []string{"drivers"}, bad: []string{"no-such-verb"}, waits: []string{"rm", "-"}},

	"dist-remote-rclone": {bad: []string{}},
	"dist-mutate":        {bad: []string{}},
	"dist-static":        {bad: []string{}},
}

// oneFile is a layer with one file, f, that contains "x".
var oneFile = func() string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "f", Size: 1, Mode: 0o644}), func() error { _, err := w.Write([]byte("x")); return err }(), w.Close()); err != nil {
		panic(err)
	}
	return b.String()
}()

func TestContract(t *testing.T) {
	silent := listen(t)
	for _, name := range all() {
		b, ok := behaviours[name]
		if !ok {
			t.Errorf("%s is not in this test's table", name)
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			store := filepath.Join(dir, "store")
			run := func(stdin string, args ...string) (string, string, int) {
				return execute(t, dir, store, stdin, name, args...)
			}

			if out, errs, status := run("", "--help"); status != 0 || !strings.Contains(out, name) || errs != "" {
				t.Errorf("--help: status %d, stdout %q, stderr %q", status, out, errs)
			}
			if out, errs, status := run("", "--version"); status != 0 || !strings.HasPrefix(out, name+" version ") || errs != "" {
				t.Errorf("--version: status %d, stdout %q, stderr %q", status, out, errs)
			}
			usage := 2
			if slices.Contains(ownFailure, name) {
				usage = 125
			}
			wrong := [][]string{{"--no-such-flag"}}
			if b.bad != nil {
				wrong = append(wrong, b.bad)
			}
			for _, args := range wrong {
				out, errs, status := run("", args...)
				if status != usage || out != "" {
					t.Errorf("%q: status %d, not %d; stdout %q", args, status, usage, out)
				}
				oneLine(t, name, errs)
			}

			blob := fixture(t, dir, store)
			fill := func(args []string) []string {
				r := strings.NewReplacer("STORE", store, "BLOB", blob, "HOST", silent, "TMP", dir)
				var filled []string
				for _, a := range args {
					filled = append(filled, r.Replace(a))
				}
				return filled
			}
			outputs := map[string][]string{"": {"--help"}}
			if b.output != nil {
				outputs[b.stdin] = fill(b.output)
			}
			for stdin, args := range outputs {
				if out, errs, status := run(stdin, args...); status != 0 || out == "" || errs != "" {
					t.Errorf("%q: status %d, stdout %q, stderr %q", args, status, out, errs)
				}
				full(t, dir, store, stdin, name, args)
				if !slices.Contains(workflows, name) {
					closedPipe(t, dir, store, stdin, name, args)
				}
			}
			if name == "dist-userns" {
				if _, errs, status := run("", "--", "true"); status != 0 {
					t.Skipf("no user namespace: %s", errs)
				}
			}
			stdin := b.stdin != ""
			for _, args := range [][]string{b.output, b.waits} {
				stdin = stdin || slices.Contains(args, "-")
			}
			for _, reads := range []string{"dist-apply", "dist-hold", "dist-import", "dist-userns"} {
				stdin = stdin || name == reads
			}
			closedStreams(t, dir, store, name, outputs, fill(b.waits), stdin)
			if b.waits != nil {
				for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
					diesBy(t, dir, store, sig, name, fill(b.waits))
				}
			}
		})
	}
	for name := range behaviours {
		if !slices.Contains(all(), name) {
			t.Errorf("this test's table names %s, which is no command", name)
		}
	}
}

// listen returns the address of a host that accepts connections and never answers.
func listen(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		var held []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				for _, c := range held {
					c.Close()
				}
				return
			}
			held = append(held, c)
		}
	}()
	return l.Addr().String()
}

func command(dir, store, name string, args ...string) *exec.Cmd {
	c := exec.Command(filepath.Join(bin, name), args...)
	c.Dir = dir
	c.Env = append(os.Environ(), "DIST_ROOT="+store, "HOME="+dir, "XDG_RUNTIME_DIR="+dir, "TMPDIR="+dir)
	return c
}

func execute(t *testing.T, dir, store, stdin string, name string, args ...string) (string, string, int) {
	t.Helper()
	var out, errs bytes.Buffer
	c := command(dir, store, name, args...)
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &errs
	status := wait(t, c, c.Run())
	return out.String(), errs.String(), status
}

func wait(t *testing.T, c *exec.Cmd, err error) int {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", c.Args, err)
	}
	if status := c.ProcessState.ExitCode(); status != 255 {
		return status
	}
	t.Errorf("%v: status 255, which stops xargs", c.Args)
	return 255
}

func oneLine(t *testing.T, name, errs string) {
	t.Helper()
	if !strings.HasPrefix(errs, name+": ") || strings.Count(errs, "\n") != 1 || !strings.HasSuffix(errs, "\n") {
		t.Errorf("stderr is not one line that begins with %q: %q", name+": ", errs)
	}
	if strings.HasSuffix(errs, ".\n") || strings.HasPrefix(errs, name+": "+name) {
		t.Errorf("stderr ends with a full stop, or has its prefix twice: %q", errs)
	}
}

// fixture makes a store with a manifest, named as an image, its config, and a blob that no name reaches. It returns the
// manifest's digest.
func fixture(t *testing.T, dir, store string) string {
	t.Helper()
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",` +
		`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`
	for _, blob := range []string{"{}", "loose"} {
		if _, errs, status := execute(t, dir, store, blob, "dist-ingest", "fixture"); status != 0 {
			t.Fatalf("dist-ingest: status %d: %s", status, errs)
		}
	}
	out, errs, status := execute(t, dir, store, manifest, "dist-ingest", "fixture")
	if status != 0 {
		t.Fatalf("dist-ingest: status %d: %s", status, errs)
	}
	digest, _, _ := strings.Cut(out, "\t")
	if _, errs, status := execute(t, dir, store, "", "dist-image", "create", "example.org/x:1", digest); status != 0 {
		t.Fatalf("dist-image create: status %d: %s", status, errs)
	}
	return digest
}

// full checks that a command fails if its output can't be written.
func full(t *testing.T, dir, store, stdin, name string, args []string) {
	t.Helper()
	dev, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skipf("no /dev/full: %v", err)
	}
	defer dev.Close()
	var errs bytes.Buffer
	c := command(dir, store, name, args...)
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), dev, &errs
	if status := wait(t, c, c.Run()); status < 1 || status > 127 {
		t.Errorf("%q to /dev/full: status %d; stderr %q", args, status, errs.String())
	}
	if !slices.Contains(workflows, name) {
		oneLine(t, name, errs.String())
	}
}

// closedStreams checks that the use of a closed standard output or input is an error, never success, and that no file
// of a workflow takes its number.
func closedStreams(t *testing.T, dir, store, name string, outputs map[string][]string, waits []string, reads bool) {
	t.Helper()
	run := func(stdin, closed string, args ...string) (string, int) {
		var errs bytes.Buffer
		c := command(dir, store, "", append([]string{"-c", closed + ` exec "$0" "$@"`, filepath.Join(bin, name)}, args...)...)
		c.Path, c.Args[0] = "/bin/sh", "sh"
		c.Stdin, c.Stderr = strings.NewReader(stdin), &errs
		status := wait(t, c, c.Run())
		return errs.String(), status
	}
	for stdin, args := range outputs {
		if errs, status := run(stdin, ">&-", args...); status < 1 || status > 127 || errs == "" {
			t.Errorf("%q >&-: status %d, stderr %q", args, status, errs)
		}
		_, want := run(stdin, "", args...)
		if _, status := run(stdin, "2>&-", args...); status != want {
			t.Errorf("%q 2>&-: status %d, not %d", args, status, want)
		}
		if reads && stdin != "" && name != "dist-put" { // it has put the object, and need not read
			if errs, status := run(stdin, "<&-", args...); status < 1 || status > 127 || errs == "" {
				t.Errorf("%q <&-: status %d, stderr %q", args, status, errs)
			}
		}
	}
	if reads && waits != nil {
		if errs, status := run("", "<&-", waits...); status < 1 || status > 127 || errs == "" {
			t.Errorf("%q <&-: status %d, stderr %q", waits, status, errs)
		}
	}
	if !slices.Contains(workflows, name) {
		return
	}
	for _, closed := range []string{"2>&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-", "<&-"} {
		seen := filepath.Join(dir, "seen")
		hook := filepath.Join(dir, "hook")
		if err := os.WriteFile(hook, []byte(`trap 'for fd in 0 1 2; do readlink "/proc/$$/fd/$fd" || echo closed; done >"$SEEN"' DEBUG`), 0o600); err != nil {
			t.Fatal(err)
		}
		_, status := run("", fmt.Sprintf("BASH_ENV=%s SEEN=%s", hook, seen)+" "+closed, "--no-such-flag")
		got, err := os.ReadFile(seen)
		if err != nil || bytes.Contains(got, []byte("closed")) || bytes.Contains(got, []byte(bin)) || status == 0 {
			t.Errorf("%s: status %d, descriptors %q, %v", closed, status, got, err)
		}
	}
}

// closedPipe checks that a command dies silently by SIGPIPE if nobody reads its output.
func closedPipe(t *testing.T, dir, store, stdin, name string, args []string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	var errs bytes.Buffer
	c := command(dir, store, name, args...)
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), w, &errs
	wait(t, c, c.Run())
	if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGPIPE || errs.Len() > 0 {
		t.Errorf("%q to a closed pipe: %v; stderr %q", args, c.ProcessState, errs.String())
	}
}

// diesBy checks that a waiting command dies by the signal it gets, and leaves no locked ingest and no child. It must
// make no difference whether the signal comes before or after the command has begun to wait. To make the latter likely,
// diesBy waits until it sleeps.
func diesBy(t *testing.T, dir, store string, sig syscall.Signal, name string, args []string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var errs bytes.Buffer
	c := command(dir, store, name, args...)
	c.Stdin, c.Stderr = r, &errs
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	sleeping(c.Process.Pid)
	_ = c.Process.Signal(sig)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL) })
	wait(t, c, c.Wait())
	stop()
	if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != sig {
		t.Errorf("%q, sent %v: %v; stderr %q", args, sig, c.ProcessState, errs.String())
	}
}

// sleeping returns when the first thread of the process sleeps and has used no processor time since the last check, or
// after two seconds.
func sleeping(pid int) {
	stat := filepath.Join("/proc", strconv.Itoa(pid), "stat")
	last := ""
	for range 100 {
		b, err := os.ReadFile(stat)
		if err != nil {
			return
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 14 {
			return
		}
		now := fields[0] + " " + fields[11] + " " + fields[12]
		if now == last && fields[0] == "S" {
			return
		}
		last = now
		time.Sleep(20 * time.Millisecond)
	}
}

// TestEmptyArgumentsAreWrongUsage gives every command and verb an empty string for each of its operands, and for
// --root. An unset variable must never be taken for "all", "none" or the working directory.
func TestEmptyArgumentsAreWrongUsage(t *testing.T) {
	for _, name := range all() {
		dir := t.TempDir()
		store := filepath.Join(dir, "store")
		calls := [][]string{nil}
		if v := verbs(t, name); v != nil {
			calls = nil
			for _, verb := range v {
				calls = append(calls, []string{verb})
			}
		}
		for _, words := range calls {
			t.Run(strings.Join(append([]string{name}, words...), " "), func(t *testing.T) {
				help := help(t, name, words...)
				usage := usageLine.FindStringSubmatch(help)
				if usage == nil {
					t.Fatalf("no usage line in %q", help)
				}
				named := operandsOf(usage[1])
				var wrong [][]string
				for i := range named {
					args := slices.Clone(words)
					for j := range named {
						args = append(args, map[bool]string{true: "", false: "x"}[i == j])
					}
					wrong = append(wrong, args)
				}
				if strings.Contains(help, " --root ") {
					args := append(slices.Clone(words), "--root", "")
					for range named {
						args = append(args, "x")
					}
					wrong = append(wrong, args)
				}
				for _, args := range wrong {
					if strings.Contains(usage[1], "[-- COMMAND") {
						args = append(args, "--")
					}
					if strings.Contains(usage[1], " COMMAND") {
						args = append(args, "true")
					}
					out, errs, status := execute(t, dir, store, "", name, args...)
					if (status != 2 && status != 125) || out != "" || !regexp.MustCompile("empty|missing|not a URL").MatchString(errs) {
						t.Errorf("%q: status %d, stdout %q, stderr %q", args, status, out, errs)
					}
				}
				if _, err := os.Stat(store); err == nil {
					t.Error("a store was made")
				}
			})
		}
	}
}

// operandsOf returns the words in a usage line that stand for operands of the command itself.
func operandsOf(usage string) []string {
	var words []string
	for _, w := range strings.Fields(usage) {
		word := strings.Trim(w, "[]…|-")
		if w == "--" || w == "[--" || slices.Contains([]string{"COMMAND", "CMD", "ARG", "HINT"}, word) {
			break
		}
		if word != "" && word == strings.ToUpper(word) {
			words = append(words, word)
		}
	}
	return words
}

// creating lists the commands and verbs that create a store if there is none, with operands that name nothing.
var creating = []string{"dist-hold", "dist-ingest", "snap prepare", "dist-namespace create", "dist-put", "dist-serve", "task create"}

// TestOnlyWritersCreateAStore gives every command and verb operands that name nothing, in a directory without a store.
func TestOnlyWritersCreateAStore(t *testing.T) {
	t.Parallel()
	for _, name := range all() {
		calls := [][]string{nil}
		if v := verbs(t, name); v != nil {
			calls = nil
			for _, verb := range v {
				calls = append(calls, []string{verb})
			}
		}
		for _, words := range calls {
			call := strings.Join(append([]string{name}, words...), " ")
			usage := usageLine.FindStringSubmatch(help(t, name, words...))
			if usage == nil || slices.Contains(creating, call) {
				continue
			}
			t.Run(call, func(t *testing.T) {
				t.Parallel()
				args := slices.Clone(words)
				for range operandsOf(usage[1]) {
					args = append(args, "x")
				}
				if strings.Contains(usage[1], " COMMAND") {
					args = append(args, "--", "true")
				}
				if call == "dist-image mv" {
					args = append(args, "--to-namespace", "other")
				}
				dir := t.TempDir()
				store := filepath.Join(dir, "store")
				_, errs, status := execute(t, dir, store, "", name, args...)
				if status == 2 && strings.Contains(errs, "usage: ") {
					t.Logf("%q is not understood: %s", args, errs)
				}
				if _, err := os.Stat(store); err == nil {
					t.Errorf("%q created a store: status %d, %s", args, status, errs)
				}
			})
		}
	}
}
