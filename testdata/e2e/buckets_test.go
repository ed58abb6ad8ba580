//go:build e2e

package e2e

import (
	"bufio"
	"net/http"
	"regexp"
	"testing"

	"distkit/testdata/fixture"
)

// bucket starts rclone's S3 server over the directory buckets, and configures the remotes s3, with its keys, and wrong, with others; and disk,
// which is files.
func (p *place) bucket() {
	p.t.Helper()
	fixture.Need(p.t, "rclone,jq")
	p.set("RCLONE_CONFIG="+p.dir+"/rclone.conf", "AWS_CA_BUNDLE=")
	p.write("rclone.conf", "[disk]\ntype = local\n")
	p.sh(`mkdir -p buckets/images`)
	c := p.cmd(`exec rclone serve s3 --addr 127.0.0.1:0 --auth-key user,word "disk:$PWD/buckets"`)
	logs, err := c.StderrPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	address := regexp.MustCompile(`http://127\.0\.0\.1:\d+`)
	lines := bufio.NewScanner(logs)
	for lines.Scan() {
		if endpoint := address.FindString(lines.Text()); endpoint != "" {
			s3 := "type = s3\nprovider = Rclone\nendpoint = " + endpoint + "\naccess_key_id = user\nsecret_access_key = "
			p.write("rclone.conf", "[disk]\ntype = local\n[s3]\n"+s3+"word\n[wrong]\n"+s3+"guess\n")
			go func() {
				for lines.Scan() { // it must not block
				}
			}()
			return
		}
	}
	p.t.Fatalf("rclone serve s3 tells no address: %v", lines.Err())
}

// TestBuckets: images in object storage and in a directory, through rclone.
func TestBuckets(t *testing.T) {
	p := before(t, http.NotFoundHandler())
	p.bucket()
	p.images()
	p.sh(`dist-pull -q --all-platforms ./images/tiny:latest >digest`)
	for _, remote := range []string{"s3:images/deep/app", "disk:" + p.dir + "/files"} {
		p.set("AT=" + remote)
		p.sh(`
far=rclone::$AT name=./images/tiny:latest
status=0; dist-tags "$far" >tags || status=$?
[ $status = 0 ] && [ ! -s tags ]
dist-push "$name" "$far:one" | cut -f3 | sort -u | grep -qx stored
dist-push "$name" "$far:two" | cut -f3 | sort | uniq -c >pushed
grep -q ' 1 stored$' pushed && grep -q exists pushed
dist-push "$name" "$far:docker.io/library/tiny:v3" >/dev/null
diff <(dist-tags "$far") <(printf '%s\n' docker.io/library/tiny:v3 one two)
[ "$(dist-resolve -q "$far" v3)" = "$(cat digest)" ]
rm -rf back && dist-pull -q --root back --all-platforms "$far:one" | cmp - digest
diff <(dist-list -q | sort) <(dist-list -q --root back | sort)
dist-check-remote --put rclone "$AT" one >checked || { grep -v '^ok' checked; exit 1; }
[ "$(grep -c SKIP checked)" -le 2 ]

# Names that are written at the same time are all there, in the view too.
for i in 1 2 3 4; do dist-put "$far" "t$i" "mediatype:$(dist-resolve "$far" one | jq -r .mediaType)" <"$(dist-path -n "$(cat digest)")" >/dev/null & done
for i in 1 2 3 4; do wait -n; done
rm -rf copy && rclone copy "$AT" copy
diff <(jq -r '.manifests[].annotations."org.opencontainers.image.ref.name" // empty' copy/index.json | sort) <(dist-tags "$far" | sort)
[ "$(dist-tags "$far" | grep -c '^t[0-9]')" = 4 ]
skopeo inspect --raw oci:copy:t3 | cmp - "$(dist-path -n "$(cat digest)")"
dist-image ls --root copy | grep -q .

# A range of a blob, by ranges of the storage.
layer=$(dist-fetch "$far" "$(jq -r '.manifests[0].digest' "$(dist-path -n "$(cat digest)")")" | jq -r '.layers[0].digest')
cmp <(dist-fetch "$far" "$layer" range:100-199) <(tail -c +101 "$(dist-path -n "$layer")" | head -c 100)

# A layout that another program has uploaded.
skopeo copy -q --all oci:images/tiny:latest oci:upload:theirs 2>/dev/null && rclone copy upload "$AT/theirs"
[ "$(dist-tags "$far/theirs")" = theirs ]
dist-pull -q --root back --all-platforms "$far/theirs:theirs" | cmp - digest
dist-push "$name" "$far/theirs:ours" >/dev/null
diff <(dist-tags "$far/theirs") <(printf '%s\n' ours theirs)
dist-untag "$far/theirs" theirs >/dev/null
[ "$(dist-tags "$far/theirs")" = ours ]
rclone cat "$AT/theirs/index.json" | jq -e '.manifests | length == 1' >/dev/null

# Damage. An object of another size is put again.
rclone copyto images/tiny/oci-layout "$AT/blobs/${layer/://}"
status=0; dist-fetch "$far" "$layer" >/dev/null 2>errors || status=$?
[ $status = 4 ] && [ "$(wc -l <errors)" = 1 ]
dist-put "$far" "$layer" "size:$(stat -Lc %s "$(dist-path -n "$layer")")" <"$(dist-path -n "$layer")" >/dev/null
dist-fetch "$far" "$layer" | cmp - "$(dist-path -n "$layer")"
rclone copyto images/tiny/oci-layout "$AT/index.json"
[ "$(dist-resolve -q "$far" one)" = "$(cat digest)" ]
dist-push "$name" "$far:again" >/dev/null
printf nonsense >nonsense && rclone copyto nonsense "$AT/tags/bad"
status=0; dist-tags "$far" 2>errors || status=$?
[ $status = 4 ] && [ "$(wc -l <errors)" = 1 ]
[ "$(dist-resolve -q "$far" one)" = "$(cat digest)" ]`)
		p.fails(3, "dist-resolve", `dist-resolve "rclone::$AT/empty" latest`)
	}
	p.fails(9, "dist-resolve", `dist-resolve rclone::wrong:images/deep/app one`)
	p.fails(9, "dist-tags", `dist-tags rclone::wrong:images/deep/app`)
	p.fails(9, "dist-copy-graph", `dist-push ./images/tiny:latest rclone::wrong:images/deep/app:x`)
	p.fails(3, "dist-resolve", `dist-resolve rclone::s3:nowhere/app one`)
	p.fails(3, "dist-copy-graph", `dist-push ./images/tiny:latest rclone::s3:nowhere/app:x`)
	p.fails(2, "dist-tags", `dist-tags rclone::unknown:images/app`)
	p.sh(`[ ! -e buckets/nowhere ]`)
}

// TestStatic: other projects' clients pull images that nginx serves from plain files.
func TestStatic(t *testing.T) {
	fixture.Need(t, "nginx,jq,crane,skopeo,regctl")
	p := before(t, http.NotFoundHandler())
	p.images()
	p.sh(`
dist-pull -q --all-platforms ./images/tiny:latest >digest
dist-static www ./images/tiny:latest team/tiny:1 | cut -f3 | sort -u | grep -qx stored
# What is there is not written again, and links cost nothing.
dist-push --static www ./images/tiny:latest team/tiny:2 | cut -f3 | sort -u | grep -qx exists
dist-static -q --platform linux/amd64 www ./images/tiny:latest other/tiny >one
[ "$(jq -c .tags www/v2/team/tiny/tags/list)" = '["1","2"]' ]
layer=$(dist-image layers --platform linux/amd64 -q ./images/tiny:latest | head -n 1)
[ "$(stat -c %h "www/v2/team/tiny/blobs/$layer")" -gt 1 ] || cmp "www/v2/team/tiny/blobs/$layer" "$(dist-path -n "$layer")"
# A tag that is removed is listed no more, and what is damaged comes back.
dist-static -q www ./images/tiny:latest team/tiny:gone >gone && rm www/v2/team/tiny/manifests/gone
rm "www/v2/team/tiny/blobs/$layer" && printf x >"www/v2/team/tiny/blobs/$layer"
dist-static www ./images/tiny:latest team/tiny:3 | grep -c stored | grep -qx 1
[ "$(jq -c .tags www/v2/team/tiny/tags/list)" = '["1","2","3"]' ] && ! grep gone www/content-types www/nginx.conf www/_headers`)
	p.fails(2, "dist-static", `dist-static www ./images/tiny:latest`)
	p.fails(2, "dist-static", `dist-static www ./images/tiny:latest '../x:1'`)
	p.fails(2, "dist-static", `dist-static www ./images/tiny:latest 'x/../../y'`)
	p.fails(5, "dist-static", `exec 3<www; flock 3; dist-static www ./images/tiny:latest x:1`)
	p.fails(1, "dist-static", `mkdir -p linked/v2 outside && ln -s "$PWD/outside" linked/v2/x && dist-static linked ./images/tiny:latest x:1`)
	p.sh(`[ -z "$(find outside -type f)" ]
# A document of a stranger's whose type would be a line of the configuration.
printf '{}' | dist-ingest -q config >config
printf '{"schemaVersion":2,"mediaType":"a/b;} location = /x { return 200;","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":2},"layers":[]}' "$(cat config)" | dist-ingest -q manifest >evil
`)
	p.fails(2, "dist-static", `dist-static -q www "$(cat evil)" evil:1`)
	p.sh(`! grep -q 'return 200;' www/nginx.conf
mkdir logs
cat >server.conf <<END
daemon off; pid $PWD/nginx.pid; error_log $PWD/logs/error; worker_processes 1; user root;
events { worker_connections 64; }
http { access_log off; client_body_temp_path $PWD/logs/a; proxy_temp_path $PWD/logs/b; fastcgi_temp_path $PWD/logs/c; uwsgi_temp_path $PWD/logs/d; scgi_temp_path $PWD/logs/e;
  server { listen unix:$PWD/socket; listen 127.0.0.1:PORT; root $PWD/www; include $PWD/www/nginx.conf; } }
END`)
	s := p.cmd(`for port in $(shuf -n 20 -i 20000-60000); do
	sed -i "s/127.0.0.1:[A-Z0-9]*/127.0.0.1:$port/" server.conf
	echo $port >port
	rm -f socket
	nginx -c "$PWD/server.conf" -e "$PWD/logs/error" && break
done`)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.sh(`kill "$(cat nginx.pid)"`)
		_ = s.Wait()
	})
	p.sh(`until [ -S socket ] && curl -sS --fail -o /dev/null --unix-socket socket http://x/v2/; do sleep 0.02; done 2>/dev/null
host=127.0.0.1:$(cat port) want="$(dist-path -n "$(cat digest)")"
curl -sS --fail -I "http://$host/v2/team/tiny/manifests/1" | tr -d '\r' | grep -qix "docker-content-digest: $(cat digest)"
crane manifest "$host/team/tiny:1" | cmp - "$want"
[ "$(crane digest "$host/team/tiny:3")" = "$(cat digest)" ]
crane pull --format oci "$host/other/tiny:latest" crane && [ "$(jq -r '.manifests[0].digest' crane/index.json)" = "$(cat one)" ]
skopeo copy -q --all --preserve-digests --src-tls-verify=false "docker://$host/team/tiny:1" oci:skopeo:1
skopeo inspect --raw oci:skopeo:1 | cmp - "$want"
HOME=$PWD regctl registry set --tls disabled "$host" 2>/dev/null
HOME=$PWD regctl image copy "$host/team/tiny:2" ocidir://regctl:2
dist-pull -q --root back --all-platforms "$host/team/tiny:2" | cmp - digest
diff <(dist-tags "$host/team/tiny") <(printf '%s\n' 1 2 3)
dist-verify --root back`)
}
