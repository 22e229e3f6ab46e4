#include "qt.h"
const struct replaced qt_ipc_replaced[] = {{NULL, NULL}};
