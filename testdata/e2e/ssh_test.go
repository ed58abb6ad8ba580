//go:build e2e

package e2e

import (
	"os"
	"testing"

	"distkit/testdata/fixture"
)

// TestSSH copies images through an sshd of an ordinary user, with its own host key, that runs on loopback.
func TestSSH(t *testing.T) {
	fixture.Need(t, "ssh")
	if _, err := os.Stat("/usr/sbin/sshd"); err != nil {
		t.Skip("needs sshd")
	}
	p := here(t)
	p.user()
	p.set("DIST_REMOTE_PATH=" + fixture.Bin)
	t.Log(p.sh(`
mkdir ssh && chmod 700 ssh && cd ssh
ssh-keygen -q -t ed25519 -N "" -f host
ssh-keygen -q -t ed25519 -N "" -f other
ssh-keygen -q -t ed25519 -N "" -f me
cp me.pub authorized
cat >sshd.conf <<END
HostKey $PWD/host
AuthorizedKeysFile $PWD/authorized
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
END
cat >config <<END
Host *
	IdentityFile $PWD/me
	IdentitiesOnly yes
	UserKnownHostsFile $PWD/known
	GlobalKnownHostsFile none
END
cat >ssh <<END
#!/bin/sh
echo "\$*" >>$PWD/log
exec ssh -F $PWD/config "\$@"
END
chmod 755 ssh
export DIST_SSH=$PWD/ssh
cd ..
for port in $(shuf -n 20 -i 20000-60000); do
	/usr/sbin/sshd -D -e -f ssh/sshd.conf -o ListenAddress=127.0.0.1 -p $port 2>ssh/said & sshd=$!
	trap 'kill $sshd' EXIT
	until grep -q "^Server listening" ssh/said || ! kill -0 $sshd 2>/dev/null; do sleep 0.01; done
	! grep -q "^Server listening" ssh/said || break
done
far=ssh::user@127.0.0.1:$port$PWD/far
half=ssh::user@127.0.0.1:$port$PWD/half
same() { diff <(dist-list -q --root "$1" | sort) <(dist-list -q --root "$2" | sort); }

# No host key is accepted that is not known, or is another.
for known in '' "$(cut -d' ' -f1,2 ssh/other.pub)"; do
	[ -z "$known" ] && : >ssh/known || echo "[127.0.0.1]:$port $known" >ssh/known
	status=0; dist-tags "$far" >out 2>errors || status=$?
	[ $status = 9 ] && [ "$(wc -l <errors)" = 1 ] && grep -q 'Host key verification failed' errors
done
echo "[127.0.0.1]:$port $(cut -d' ' -f1,2 ssh/host.pub)" >ssh/known
status=0; dist-tags "ssh::user@127.0.0.1:1/x" 2>errors || status=$?
[ $status = 6 ]
status=0; dist-tags "$far" 2>errors || status=$?
[ $status = 3 ]

# There and back.
name=$(dist-pull --all-platforms ` + image + ` | cut -f1)
dist-push "$name" "$far" | cut -f3 | sort | uniq -c >pushed
! grep -q exists pushed
[ "$(dist-tags "$far")" = "$name" ]
same .content far
dist-push "$name" "$far" | cut -f3 | sort -u | grep -qx exists
dist-pull -q --root back --all-platforms "$far:$name" >digest
same .content back

# What is here already costs one call.
: >ssh/log
dist-pull -q --root back --all-platforms "$far:$name" | cmp - digest
[ "$(wc -l <ssh/log)" = 1 ]

# The far end of the first connection that brings the image is killed after a third of the bytes. It goes on from there, over another one.
cat >ssh/breaking <<'END'
#!/bin/bash
case $* in
*dist-fetch*) ;;
*) exec "$DIR/ssh" "$@" ;;
esac
n=$(flock "$DIR/lock" sh -c 'echo x >>"$0"; wc -l <"$0"' "$DIR/started")
"$DIR/ssh" "$@" < <(tee -a "$DIR/requests") | {
	stdbuf -o0 head -c "$((ALL / 3))"
	if ((n == 1)); then
		touch "$DIR/half"
		until [[ -e $DIR/killed ]]; do sleep 0.01; done
	fi
	cat
} | tee -a "$DIR/came"
exit "${PIPESTATUS[0]}"
END
chmod 755 ssh/breaking
broken() { # ROOT COMMAND…
	rm -f ssh/started ssh/requests ssh/came ssh/half ssh/killed
	DIR=$PWD/ssh ALL=$all DIST_SSH=$PWD/ssh/breaking dist-pull -q --root "$1" --jobs 1 --all-platforms "$far:$name" >digest 2>errors &
	pull=$!
	until [ -e ssh/half ] || ! kill -0 $pull 2>/dev/null; do sleep 0.01; done
	"${@:2}"
	for child in $(pgrep -P $sshd); do kill -9 $(pgrep -P $child) $child; done
	touch ssh/killed
	wait $pull
}
all=$(cat far/blobs/sha256/* | wc -c)
broken broken true
same far broken
grep -q offset: ssh/requests
[ "$(wc -l <ssh/started)" = 2 ]
came=$(wc -c <ssh/came)
echo "$came bytes came of $all"
[ "$came" -lt $((all * 5 / 4)) ]

# A push whose connection breaks after half of the bytes sends the rest alone, in the same run and after another one that gave up.
head -c 40000000 /dev/urandom >noise
dist-ingest --root large <noise noise >layer
config=$(printf '{"os":"linux","architecture":"amd64"}' | dist-ingest --root large -q config)
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":37},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"%s","size":40000000}]}' "$config" "$(cut -f1 layer)" >manifest
dist-image create --root large large:1 "$(dist-ingest --root large -q manifest <manifest)"
cat >ssh/breaking <<'END'
#!/bin/bash
case $* in
*dist-put*) ;;
*) exec "$DIR/ssh" "$@" ;;
esac
n=$(flock "$DIR/lock" sh -c 'echo x >>"$0"; wc -l <"$0"' "$DIR/started")
most=1000000000
((n > CUTS)) || most=$((n == 1 ? 20000000 : 100000))
stdbuf -o0 head -c "$most" | tee >(wc -c >>"$DIR/sent") | "$DIR/ssh" "$@"
END
sent() { # CUTS STATUS
	rm -f ssh/started ssh/sent
	status=0
	DIR=$PWD/ssh CUTS=$1 DIST_SSH=$PWD/ssh/breaking dist-push -q --root large large:1 "$half" >digest 2>errors || status=$?
	[ $status = "$2" ] || { cat errors; return 1; }
	awk '{n += $1} END {print n}' ssh/sent
}
sent 9 6
total=$(sent 0 0)
echo "$total bytes were sent after a push that gave up"
[ "$total" -lt 30000000 ]
dist-fetch "$half" "$(cut -f1 layer)" | cmp - noise

# From one machine to another, and a key that is refused.
dist-copy "$far:$name" "ssh::user@127.0.0.1:$port$PWD/third" >/dev/null
same far third
cp ssh/other.pub ssh/authorized
status=0; dist-tags "$far" 2>errors || status=$?
[ $status = 9 ] && grep -q 'Permission denied' errors
cp ssh/me.pub ssh/authorized

# If the machine does not come back, what has come stays for another attempt.
status=0; broken gone kill $sshd || status=$?
[ $status = 6 ] && [ "$(wc -l <errors)" = 1 ]
[ "$(find gone/blobs/ gone/ingest/ -type f -exec cat {} + | wc -c)" -gt $((all / 4)) ]
trap - EXIT
`))
}
