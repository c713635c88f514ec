package node

import (
	"fmt"
	"net/http"
	"strconv"
)

// enrolHandler answers klamm hook, which asks POST /v1/enrol?pid=PID before the container runtime starts that process:
// 204 when connects in its network namespace are redirected; otherwise the body says why they are not.
func enrolHandler(e enroller) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		pid, err := strconv.ParseUint(r.FormValue("pid"), 10, 31)
		if err != nil || pid == 0 {
			http.Error(w, fmt.Sprintf("pid=%q is not a process id", r.FormValue("pid")), http.StatusBadRequest)
			return
		}
		if err := e.enrol(netnsPath(int(pid)), 0); err != nil {
			http.Error(w, fmt.Sprintf("enrol the network namespace of process %d: %v", pid, err),
				http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}
}
