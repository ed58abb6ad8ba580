package scenarios

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"distkit/testdata/fixture"
	"distkit/testdata/registry/faults"
	"distkit/testdata/registry/layouts"
)

// complaints are problems that users of other tools that fetch images report, in short. Each is answered by a script
// that runs here, or by tests elsewhere, which must exist.
var complaints = []struct {
	complaint string
	script    string   // bash, with the tests' registry
	faults    []string // of the registry, during the script
	status    int
	stdout    string // the script's output, without the last newline
	tests     string // FILE:TEST…
}{
	// Output and exit statuses.
	{complaint: "progress is printed among the data, on standard output",
		script: `dist-pull docker.io/library/redis:latest 2>errors | cut -f1; cat errors; dist-fetch docker.io/library/redis latest | sha256sum | cut -d' ' -f1 | cmp - <(dist-resolve docker.io/library/redis latest | jq -r '.digest[7:]')`,
		stdout: "docker.io/library/redis:latest"},
	{complaint: "an archive written to standard output is corrupted by messages, and none can be read from standard input",
		script: `dist-pull -q tiny.example/tiny:amd64 >/dev/null; dist-export tiny.example/tiny:amd64 | dist-import --root other - >/dev/null; dist-image ls --root other -q`,
		stdout: "tiny.example/tiny:amd64"},
	{complaint: "no exit status tells whether the image is missing, or I may not have it, or the network is down",
		script: `for url in docker.io/library/none 127.0.0.1:1/x no-such-host.invalid/x; do status=0; dist-resolve $url latest 2>/dev/null || status=$?; echo $status; done`,
		stdout: "3\n6\n6", tests: "testdata/e2e/registries_test.go:TestPrivateRegistry"},
	{complaint: "access denied looks like not found", faults: []string{"status=403"}, script: `dist-fetch docker.io/library/redis latest`, status: 9},
	{complaint: "a login that is missing looks like not found", faults: []string{"status=401"}, script: `dist-fetch docker.io/library/redis latest`, status: 9},
	{complaint: "wrong usage exits with 0, and CI goes on", script: `dist-fetch docker.io/library/redis`, status: 2},
	{complaint: "progress can't be had without a terminal", faults: []string{"hang=1000 path=/blobs/"},
		script: `dist-pull docker.io/library/redis:latest & until dist-active | awk -F'\t' '$2 ~ /^[0-9]+$/ { ok = 1 } END { exit !ok }'; do sleep 0.01; done; echo 1; kill $!; wait $! 2>/dev/null || true`,
		stdout: "1"},

	// The network.
	{complaint: "a large layer is downloaded from its start after each interruption",
		script: `layer=$(dist-pull -q --root first tiny.example/tiny:plain >/dev/null; dist-image layers --root first tiny.example/tiny:plain | sort -t"$(printf '\t')" -k2 -n | tail -n1 | cut -f1)
curl -sX POST --data-binary "cut=500000 path=/blobs/ times=5" "$REGISTRY/_fault"; curl -sX DELETE "$REGISTRY/_stats"
for i in 1 2 3 4 5 6; do dist-ingest --expected-digest $layer ref -- dist-fetch tiny.example/tiny $layer offset:{offset} >/dev/null 2>&1 && break; done
size=$(stat -c %s .content/blobs/sha256/${layer#*:}); curl -s "$REGISTRY/_stats" | jq ".blobs.bytes <= $size + 1000000"`,
		stdout: "true", tests: "testdata/e2e/e2e_test.go:TestPullKilled testdata/scenarios/pull_interrupted.txtar: remotes/fetch_test.go:TestFetchCutAtEveryPosition,TestFetchCutOften"},
	{complaint: "what an interrupted download leaves makes the image unpullable", faults: []string{"hang=1000 path=/blobs/ times=4"},
		script: `dist-pull docker.io/library/redis:latest & until dist-active | grep -q .; do sleep 0.01; done; kill -9 $!; wait $! 2>/dev/null || true
until for d in .content/ingest/*/; do find "$d" -type f ! -name lock -delete; done; dist-pull -q docker.io/library/redis:latest >/dev/null 2>&1; do sleep 0.1; done; dist-verify -q | wc -l`,
		stdout: "0", tests: "content/ingest_test.go:TestIngestsThatAreTornHeal"},
	{complaint: "a download stalls for ever, and goes on when it is interrupted and run again",
		tests: "remotes/fetch_test.go:TestStall,TestDrip"},
	{complaint: "429 is answered by asking again at once", faults: []string{"status=429,1 times=1"},
		script: `dist-fetch docker.io/library/redis latest 2>&1 >/dev/null | grep -o 'asks to wait 1s: 429 Too Many Requests'; curl -s "$REGISTRY/_log" | wc -l`,
		stdout: "asks to wait 1s: 429 Too Many Requests\n2", tests: "remotes/fetch_test.go:TestRetryAfter testdata/e2e/registries_test.go:TestBusyRegistry"},
	{complaint: "Retry-After is cut to a few seconds, or not read as a date", tests: "remotes/fetch_test.go:TestRetryAfter"},
	{complaint: "many tries are of no use, as all of them fail within a second", tests: "remotes/fetch_test.go:TestBackoff,TestRetryAfter"},
	{complaint: "the limit of parallel transfers is not kept, or blocks for ever",
		script: `dist-pull -q -j 1 docker.io/library/redis:latest >/dev/null; cat most; echo; dist-pull -q -j 8 --root other docker.io/library/redis:latest >/dev/null`,
		stdout: "1"},
	{complaint: "one flag is for plain HTTP and for a certificate that can't be verified, and no file of an authority can be given",
		tests: "testdata/e2e/registries_test.go:TestPrivateRegistry remotes/hosts_test.go:TestTLS"},
	{complaint: "mirrors can't be given headers of their own", tests: "remotes/auth_test.go:TestRedirect"},
	{complaint: "looking at one image lists all tags",
		script: `dist-resolve docker.io/library/redis latest >/dev/null; curl -s "$REGISTRY/_log" | jq -r '"\(.method) \(.path)"'`,
		stdout: "HEAD /v2/library/redis/manifests/latest"},
	{complaint: "layers that are there cost seconds each, or are fetched again",
		script: `dist-pull -q docker.io/library/redis:latest >/dev/null; curl -sX DELETE "$REGISTRY/_stats"; dist-pull -q docker.io/library/redis:latest >/dev/null; curl -s "$REGISTRY/_stats" | jq '.blobs.get + .blobs.head + .manifests.get'`,
		stdout: "0"},
	{complaint: "no proxy is used",
		script: `HTTP_PROXY=http://$REGISTRY dist-resolve --plain-http --hosts-dir none registry.example/library/redis latest | jq -r .digest | cmp - <(dist-resolve docker.io/library/redis latest | jq -r .digest)`},

	// Replies of registries.
	{complaint: "a Range that is answered with the whole is an error, or taken for the rest", faults: []string{"ignore-range"},
		script: `dist-fetch docker.io/library/redis "$(dist-fetch docker.io/library/redis latest | sha256sum | sed 's/^/sha256:/; s/ .*//')" | cmp - <(dist-fetch docker.io/library/redis latest)`,
		tests:  "remotes/fetch_test.go:TestFetchOffset,TestFetchWrongRange"},
	{complaint: "a range of unknown total, bytes 5-9/*, is refused", tests: "remotes/fetch_test.go:TestFetchCutOften,TestFetchParts"},
	{complaint: "a proxy that compresses makes every digest wrong", tests: "remotes/fetch_test.go:TestGzipTransfer"},
	{complaint: "a manifest is not compared with the digest that was asked for",
		script: `digest=$(dist-resolve docker.io/library/redis latest | jq -r .digest); curl -sX POST --data-binary "wrong-bytes path=/manifests/" "$REGISTRY/_fault"; dist-fetch docker.io/library/redis $digest mediatype:application/vnd.docker.distribution.manifest.list.v2+json`,
		status: 4},
	{complaint: "a reply without end is read into memory", tests: "cmd/hostile_linux_test.go:TestHostileRegistry,TestFetchMemory"},
	{complaint: "a file that was cut is kept, served, and fails later", faults: []string{"short=100 path=/blobs/"},
		script: `dist-pull -q docker.io/library/redis:latest 2>/dev/null || true; dist-image ls; curl -sX DELETE "$REGISTRY/_fault"; dist-pull -q docker.io/library/redis:latest >/dev/null; dist-verify -q | wc -l`,
		stdout: "0", tests: "cmd/dist-ingest/ingest_test.go:TestWhatIsWrongIsThrownAway"},
	{complaint: "HTTP/2 streams that are reset fail the download", tests: "remotes/fetch_test.go:TestTLSCut"},

	// Credentials.
	{complaint: "a credential helper that is not installed breaks pulls that need none",
		script: `mkdir -p "$DOCKER_CONFIG" && echo '{"credsStore":"is-missing"}' >"$DOCKER_CONFIG/config.json"; dist-pull -q docker.io/library/redis:latest | cut -c1-7`, stdout: "sha256:"},
	{complaint: "the credential helper is run though nobody asks for a login",
		script: `mkdir -p "$DOCKER_CONFIG" helpers && echo '{"credsStore":"noted"}' >"$DOCKER_CONFIG/config.json"; printf '#!/bin/sh\necho called >>calls\n' >helpers/docker-credential-noted; chmod +x helpers/*; touch calls
PATH=$PWD/helpers:$PATH dist-pull -q docker.io/library/redis:latest >/dev/null; wc -l <calls`, stdout: "0"},
	{complaint: "each of many processes runs the helper and asks for a token",
		tests: "testdata/e2e/registries_test.go:TestBetweenProcesses remotes/share_test.go:TestSharedToken"},
	{complaint: "docker's config.json is ignored", tests: "remotes/auth_test.go:TestTokenWithPassword,TestTokenWithIdentityToken,TestBasic,TestCredentialHelper"},
	{complaint: "logins of podman are not found, and one of another path is sent", tests: "remotes/credentials_test.go:TestCredentialPlaces,TestCredentialOfRepository"},
	{complaint: "credentials are sent to whatever realm the registry names", tests: "remotes/auth_test.go:TestEvilRealm,TestOwnsRealm remotes/secrets_test.go:TestRealmSpellings,TestRealmNamed"},
	{complaint: "credentials follow redirects and Location headers to other hosts", tests: "remotes/auth_test.go:TestRedirect,TestRedirectChallenge remotes/put_test.go:TestPutLocation remotes/secrets_test.go:TestUploadLocationOrigin,TestRedirectAndBack,TestBodiesStayInTLS"},

	// The store.
	{complaint: "copies in parallel into one layout lose names",
		script: `manifest=$(dist-fetch redis.example/redis latest); for i in $(seq 8); do echo $i; done | xargs -P8 -I{} bash -c 'dist-put -q ./layout {} mediatype:application/vnd.oci.image.manifest.v1+json <<<"$0" >/dev/null' "$manifest"; dist-tags ./layout | wc -l
for t in latest amd64 arm64 zstd plain numeric; do echo $t; done | xargs -P6 -I{} dist-pull -q --all-platforms tiny.example/tiny:{} >/dev/null; dist-image ls -q | wc -l`,
		stdout: "8\n6", tests: "image/names_test.go:TestParallelWritersLoseNothing"},
	{complaint: "what two images share is fetched and kept twice",
		script: `dist-pull -q tiny.example/tiny:latest >/dev/null; curl -sX DELETE "$REGISTRY/_stats"; dist-pull -q tiny.example/tiny:amd64 >/dev/null; curl -s "$REGISTRY/_stats" | jq .blobs.get`, stdout: "0"},
	{complaint: "of an index every platform is fetched",
		script: `dist-pull -q --platform linux/arm64 tiny.example/tiny:latest >/dev/null; curl -s "$REGISTRY/_stats" | jq .blobs.get`, stdout: "4"},
	{complaint: "sha512 is not understood", tests: "remotes/fetch_test.go:TestFetchSHA512 content/store_test.go:TestBlobsOfBothAlgorithms"},
}

func TestComplaints(t *testing.T) {
	fixture.Need(t, "jq,curl")
	for _, c := range complaints {
		t.Run(strings.Map(func(r rune) rune {
			if r == ' ' || r == '/' {
				return '_'
			}
			return r
		}, c.complaint), func(t *testing.T) {
			t.Parallel()
			if c.script == "" && c.tests == "" {
				t.Fatal("nothing answers it")
			}
			for _, place := range strings.Fields(c.tests) {
				file, names, _ := strings.Cut(place, ":")
				text, err := os.ReadFile(filepath.Join(fixture.Root, file))
				if err != nil {
					t.Error(err)
				}
				for _, name := range strings.FieldsFunc(names, func(r rune) bool { return r == ',' }) {
					if !regexp.MustCompile(`(?m)^func ` + name + `\(`).Match(text) {
						t.Errorf("%s has no %s", file, name)
					}
				}
			}
			if c.script != "" {
				answer(t, c.script, c.faults, c.status, c.stdout)
			}
		})
	}
}

// answer runs a script in its own directory, with further names for the registry. The file most gets the largest number
// of blobs that were requested at the same time.
func answer(t *testing.T, script string, list []string, status int, stdout string) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	images, err := fixture.Images()
	if err != nil {
		t.Fatal(err)
	}
	here := filepath.Join(dir, "here")
	registry := &counting{Handler: layouts.New(images, true), file: filepath.Join(here, "most")}
	w, err := fixture.Surround(dir, registry)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, d := range []string{here, filepath.Join(dir, "hosts/tiny.example"), filepath.Join(dir, "hosts/redis.example")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if d != here {
			if err := os.WriteFile(filepath.Join(d, "hosts.toml"), []byte("server = 'http://"+w.Addr+"'\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range list {
		f, err := faults.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		w.Add(f)
	}
	c := exec.Command("bash", "-euo", "pipefail", "-c", script)
	c.Dir, c.Env = here, w.Vars
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err = fixture.Run(c)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if got := c.ProcessState.ExitCode(); got != status {
		t.Errorf("status %d, not %d: %s", got, status, &errs)
	}
	if got := strings.TrimSuffix(out.String(), "\n"); got != stdout {
		t.Errorf("it printed %q, not %q: %s", got, stdout, &errs)
	}
}

// counting writes to a file the largest number of blobs that it served at the same time.
type counting struct {
	http.Handler
	file string

	mu        sync.Mutex
	now, most int
}

func (c *counting) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.Contains(r.URL.Path, "/blobs/") {
		c.Handler.ServeHTTP(w, r)
		return
	}
	c.mu.Lock()
	if c.now++; c.now > c.most {
		c.most = c.now
		_ = os.WriteFile(c.file, fmt.Append(nil, c.most), 0o644)
	}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.now--
		c.mu.Unlock()
	}()
	c.Handler.ServeHTTP(w, r)
}
