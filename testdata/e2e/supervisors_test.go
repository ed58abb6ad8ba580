//go:build e2e

package e2e

import (
	"testing"

	"distkit/testdata/fixture"
)

// A container that s6 and runit start and stop, at any moment of its start, ends each time by one TERM, and nothing of it is left.
func TestSupervisors(t *testing.T) {
	fixture.Need(t, "root,runc,overlay,s6-svscan,runsvdir")
	p := here(t)
	p.id()
	p.sh(`dist-pull --unpack `+single+` >/dev/null
		mkdir -p services/$ID && cp "$0/contrib/service-run" services/$ID/run && touch services/$ID/down
		echo `+single+` >services/$ID/image && printf '%s\n' sleep 4009 >services/$ID/command
		echo --net=none >services/$ID/flags`, fixture.Root)
	for _, tt := range []struct{ name, start, up, down, end string }{
		{"s6", "s6-svscan services >log 2>&1 & until s6-svok services/$ID; do sleep 0.05; done", "s6-svc -u services/$ID",
			"s6-svc -wd -T 20000 -d services/$ID", "s6-svscanctl -t services; wait"},
		{"runit", "runsvdir services >log 2>&1 & until sv status ./services/$ID >/dev/null; do sleep 0.05; done", "sv up ./services/$ID >/dev/null",
			"sv -w 20 down ./services/$ID >/dev/null", "kill -HUP $!; wait || true; sv exit ./services/$ID >/dev/null || true; while pgrep -f \"^runsv $ID\" >/dev/null; do sleep 0.05; done"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := *p
			q.t = t
			before := q.sh(left)
			if got := q.sh("export DIST_ROOT=$PWD/.content\n" + tt.start + "\nfor n in $(seq 0 19); do\n" + tt.up +
				"\nsleep 0.$(printf %03d $((n * 25)))\n" + tt.down + " || echo $n: TERM was lost\ndone\n" + tt.end); got != "" {
				t.Error(got)
			}
			q.sh("dist-run --rm " + single + " true") // a TERM before run begins leaves the container to the next start
			if after := q.sh(left); after != before {
				t.Errorf("it left:\n%s", difference(before, after))
			}
		})
	}
	t.Run("systemd", func(t *testing.T) {
		q := *p
		q.t = t
		q.systemd(t)
	})
}
