//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"distkit/testdata/fixture"
)

// servers are registries of other projects. Of distribution there are two: the one that Debian has, and the newest.
var servers = []string{"docker-registry", "distribution", "olareg"}

// server makes a place before a registry, empty and without authentication.
func server(t *testing.T, name string, front func(http.Handler) http.Handler) *place {
	t.Helper()
	if name == "olareg" {
		return olaregAt(t, 0, nil)
	}
	fixture.Need(t, name+",jq")
	addr, held, err := serve(name, filepath.Join(t.TempDir(), "registry"), `validation: {manifests: {urls: {allow: ["^https://example.org/"]}}}`, "", http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { held.Close() })
	handler := quiet(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: addr}))
	if front != nil {
		handler = front(handler)
	}
	p := before(t, handler)
	p.set("HOST=" + p.Addr)
	return p
}

// makeBlobs is a part of scripts: it makes ./blob and its digest, new with each call.
const makeBlobs = `
new() { head -c "${1-9000000}" /dev/urandom >blob; digest=sha256:$(sha256sum <blob | cut -d' ' -f1); }
has() { dist-fetch "$1" "$digest" | cmp - blob; }
`

// TestServers: what is put, mounted, referred to and deleted at real registries.
func TestServers(t *testing.T) {
	for _, name := range servers {
		t.Run(name, func(t *testing.T) {
			p := server(t, name, nil)
			p.login(p.Addr, "me:word")
			if name == "distribution" { // the others are elsewhere
				p.exchange(p.Addr)
			} else {
				p.images()
				p.sh(byHand+` >/dev/null && dist-fetch "$1" latest >m && dist-put "$1" other <m >/dev/null`, "./images/tiny", p.Addr+"/by/hand", "latest", "latest")
			}
			p.uploads()
			p.sh(makeBlobs + `new 100000
dist-put "$HOST/from" "$digest" <blob >/dev/null
[ "$(dist-put "$HOST/to" "$digest" mount:from </dev/null | cut -f3)" = mounted ] && has "$HOST/to"
[ "$(dist-put "$HOST/again" "$digest" mount:none <blob | cut -f3)" = stored ] && has "$HOST/again"
[ "$(dist-put "$HOST/again" "$digest" </dev/null | cut -f3)" = exists ]`)
			p.referrers()
			p.unlisted()
			p.tags()
			if name != "olareg" { // which lists no repositories
				p.catalog()
			}
			p.foreign()
		})
	}
}

// uploads puts blobs from files and pipes, and goes on with those of processes that were killed.
func (p *place) uploads() {
	p.t.Helper()
	p.sh(makeBlobs + `
new && dist-put "$HOST/up" "$digest" <blob >/dev/null && has "$HOST/up"
new && cat blob | dist-put "$HOST/up" "$digest" >/dev/null && has "$HOST/up"
new && cat blob | dist-put "$HOST/up" "$digest" size:9000000 >/dev/null && has "$HOST/up"
new 8388608 && cat blob | dist-put "$HOST/up" "$digest" >/dev/null && has "$HOST/up"
new 0 && dist-put "$HOST/up" "$digest" <blob >/dev/null && has "$HOST/up"
new 1 && cat blob | dist-put "$HOST/up" "$digest" >/dev/null && has "$HOST/up"
new && status=0 && { dist-put "$HOST/up" "${digest%?????}00000" <blob 2>/dev/null || status=$?; } && [ $status = 4 ]
mkfifo fifo
for hint in - size:9000000; do
	new
	dist-put --debug "$HOST/killed" "$digest" "$hint" <fifo 2>log & pid=$!
	exec 3>fifo
	head -c 8900000 blob >&3
	until [ $hint != - ] || [ "$(grep -c 'PATCH .*: 202' log)" = 1 ]; do kill -0 $pid; sleep 0.01; done
	kill -9 $pid && { wait $pid || true; } 2>/dev/null
	exec 3>&-
	dist-put --debug "$HOST/killed" "$digest" <blob 2>log >/dev/null
	[ $hint != - ] || grep -q 'the registry has 4194304 bytes of it' log
	has "$HOST/killed"
done
rm fifo`)
}

// unlisted deletes a referrer: it is listed no more, and others can be added.
func (p *place) unlisted() {
	p.t.Helper()
	p.sh(`subject=$(dist-resolve "$HOST/by/hand" other | jq -r .digest)
list() { dist-referrers -q --artifact-type tests/hand "$HOST/by/hand" "$subject"; }
first=$(list | head -n1)
dist-fetch "$HOST/by/hand" "$first" >first
dist-untag "$HOST/by/hand" "$first" >/dev/null
[ "$(list | wc -l)" = 4 ] && ! list | grep -q "$first"
jq -c '.annotations.i = "6"' first >sixth
dist-put "$HOST/by/hand" "sha256:$(sha256sum <sixth | cut -d' ' -f1)" mediatype:application/vnd.oci.image.manifest.v1+json <sixth >/dev/null
[ "$(list | wc -l)" = 5 ]
[ "$(dist-referrers -q --annotation i=6 "$HOST/by/hand" "$subject" | wc -l)" = 1 ]`)
}

// tags puts tags that may not exist, and deletes many.
func (p *place) tags() {
	p.t.Helper()
	p.sh(`dist-fetch "$HOST/by/hand" other >m
for tag in a b c; do dist-put --if-absent "$HOST/by/hand" $tag <m >/dev/null; done
[ "$(dist-put --if-absent "$HOST/by/hand" a <m | cut -f3)" = exists ]
status=0 && { jq . m | dist-put --if-absent "$HOST/by/hand" a 2>/dev/null || status=$?; } && [ $status = 7 ]
dist-fetch "$HOST/by/hand" a | cmp - m
status=0 && { printf '%s\n' a none b | dist-untag "$HOST/by/hand" - >gone 2>/dev/null || status=$?; } && [ $status = 3 ]
[ "$(paste -sd ' ' gone)" = 'a b' ]
dist-tags "$HOST/by/hand" >left && grep -qx c left && ! grep -qxE 'a|b' left
dist-fetch "$HOST/by/hand" c | cmp - m`)
}

// catalog lists the repositories of the registry.
func (p *place) catalog() {
	p.t.Helper()
	p.sh(makeBlobs + `new 10
echo '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}' >none
for i in 1 2 3; do # old ones list what has blobs, new ones what has manifests
	dist-put "$HOST/by/$i" "$digest" >/dev/null <blob
	dist-put "$HOST/by/$i" latest >/dev/null <none
done
dist-tags "$HOST/" >all && for repository in by/hand by/1 by/2 by/3; do grep -qx "$repository" all; done
[ "$(dist-tags --sort name --filter name~=^by/ "$HOST/" | paste -sd ' ')" = "$(LC_ALL=C sort all | grep ^by/ | paste -sd ' ')" ]
[ "$(dist-tags --json "$HOST/" | jq -r .repository | sort)" = "$(sort all)" ]`)
}

// foreign pushes an image with a layer that is not sent.
func (p *place) foreign() {
	p.t.Helper()
	p.sh(`export DIST_ROOT=foreign
dist-pull -q --platform linux/amd64 "$HOST/by/hand:other" >/dev/null
digest=$(dist-image target --platform linux/amd64 "$HOST/by/hand:other" | cut -f1)
dist-cat "$digest" | jq -c '.layers += [{mediaType: (.layers[0].mediaType | sub("docker.image.rootfs.diff"; "docker.image.rootfs.foreign.diff") | sub("layer.v1"; "layer.nondistributable.v1")),
	digest: ("sha256:" + "0" * 64), size: 1, urls: ["https://example.org/layer"]}]' | dist-ingest manifest >manifest
dist-image create foreign:1 "$(cut -f1 manifest)" >/dev/null
dist-push foreign:1 "$HOST/foreign:1" | cut -f3 | grep -qx foreign
dist-fetch "$HOST/foreign" 1 | cmp - "$(dist-path -n "$(cut -f1 manifest)")"`)
}

// TestServersBehindLimits: what stands before a registry, or is one, and does not take every request.
func TestServersBehindLimits(t *testing.T) {
	for name, refuse := range map[string]func(r *http.Request) int{
		"nginx": func(r *http.Request) int { // client_max_body_size 1m
			if r.ContentLength > 1<<20 {
				return http.StatusRequestEntityTooLarge
			}
			return 0
		},
		"ghcr": func(r *http.Request) int {
			if r.Method == http.MethodPatch && r.ContentLength > 4<<20 {
				return http.StatusRequestedRangeNotSatisfiable
			}
			return 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := server(t, "docker-registry", func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if status := refuse(r); status != 0 {
						w.WriteHeader(status)
						_, _ = io.WriteString(w, `{"errors":[{"code":"BLOB_UPLOAD_INVALID","message":"too large"}]}`)
						return
					}
					next.ServeHTTP(w, r)
				})
			})
			p.sh(makeBlobs + `
for how in 'cat blob | dist-put "$HOST/x" "$digest"' 'cat blob | dist-put "$HOST/x" "$digest" size:9000000' 'dist-put "$HOST/x" "$digest" <blob'; do
	new && bash -euo pipefail -c "export digest=$digest; $how" >/dev/null && has "$HOST/x"
done`)
			if name == "nginx" && p.asked("PATCH ") == 0 {
				t.Error("nothing went in chunks")
			}
		})
	}
	// One that takes no chunks has to be told the size.
	t.Run("Artifact_Registry", func(t *testing.T) {
		p := server(t, "docker-registry", func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPatch {
					w.WriteHeader(http.StatusMethodNotAllowed)
					fmt.Fprint(w, `{"errors":[{"code":"UNSUPPORTED","message":"no chunks"}]}`)
					return
				}
				next.ServeHTTP(w, r)
			})
		})
		p.sh(makeBlobs + `new && cat blob | dist-put "$HOST/x" "$digest" size:9000000 >/dev/null && has "$HOST/x"`)
		if line := p.fails(1, "dist-put", `head -c 9000000 blob | cat - blob | dist-put "$HOST/x" sha256:`+strings.Repeat("0", 64)); !strings.Contains(line, "no chunks") {
			t.Errorf("it says %s", line)
		}
	})
}
